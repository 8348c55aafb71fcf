"""The end of a gateway as its clients see it: who is here is served, who waits too long is told."""

import asyncio
from contextlib import suppress

from kvcached_gateway.line.line import Line
from kvcached_gateway.models.fleet import Fleet

__all__ = ["drain"]

LOOK_SECONDS = 0.2  # nobody tells when a client leaves the line


async def drain(fleet: Fleet, line: Line, seconds: float) -> None:
    """Wait until no request is here, for some seconds at most; then refuse those that wait.

    Whoever calls lets no new ones come.
    """
    news = asyncio.Event()
    fleet.on_lease.append(lambda _model: news.set())
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while any(model.num_leases for model in fleet.all) or any(line.views()):
                news.clear()
                with suppress(TimeoutError):
                    await asyncio.wait_for(news.wait(), LOOK_SECONDS)
    line.close()
