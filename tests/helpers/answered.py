"""What servers answer to bursts of requests, none of which may fail."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

from helpers.waiting import PATIENCE_SECONDS
from kvcached_core.control import Outcome, set_limit
from kvcached_demo.harness.load import Burst, Completion
from kvcached_demo.harness.server import EngineServer


def tokens_of(completions: Sequence[Completion]) -> list[list[int]]:
    """Return the tokens of each request; fail if one of them did."""
    assert [completion.error for completion in completions] == [None] * len(completions)
    return [completion.token_ids for completion in completions]


def ask(server: EngineServer, burst: Burst) -> list[list[int]]:
    """Send a burst; return the tokens of each of its requests."""
    return tokens_of(asyncio.run(server.send(burst)))


def ask_meanwhile(
    server: EngineServer,
    burst: Burst,
    is_midway: Callable[[], bool],
    act: Callable[[], object] = lambda: None,
) -> list[list[int]]:
    """Send a burst, and do something in a thread as soon as it is midway; return its tokens."""

    async def send() -> list[Completion]:
        load = asyncio.create_task(server.send(burst))
        while not is_midway():
            assert not load.done()
            await asyncio.sleep(0.01)
        await asyncio.to_thread(act)
        return await load

    return tokens_of(asyncio.run(send()))


def set_and_reached(name: str, limit: str, directory: Path) -> None:
    """Set a limit, and wait until the server holds no more."""
    answer = set_limit(name, limit, directory=directory, wait_seconds=PATIENCE_SECONDS)
    assert answer.outcome is Outcome.APPLIED
