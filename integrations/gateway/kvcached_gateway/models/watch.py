"""Whether an engine hangs: its health is silent, or it runs requests and no token moves."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from kvcached_gateway.engines.words import Counters
from kvcached_gateway.errors import EngineDiedError

__all__ = ["Patience", "hang", "well_again"]

LOOK_SECONDS = 0.05


@dataclass(frozen=True)
class Patience:
    """How long an engine is waited for, in seconds.

    Attributes:
        health_seconds: Between two questions for its health, and for the answer.
        num_silent: How many of those may be missed, one after the other, less one.
        still_seconds: How long its tokens may stand still while it runs requests.
        hung_seconds: How long one that hangs keeps the requests that it has.
        end_seconds: How long one that is told to end may take.
        abort_seconds: How long one that is aborted has to write its stacks.
        retry_seconds: After how long a model that failed may be tried again: the first time, the
            second, and so on.
    """

    health_seconds: float = 5.0
    num_silent: int = 3
    still_seconds: float = 60.0
    hung_seconds: float = 30.0
    end_seconds: float = 15.0
    abort_seconds: float = 3.0
    retry_seconds: tuple[float, ...] = (5.0, 15.0, 60.0, 300.0)


class Watched(Protocol):
    """What is asked of an engine."""

    async def health(self, seconds: float) -> bool:
        """Return whether it is well."""

    async def counters(self) -> Counters:
        """Return what it says of its work."""


async def hang(
    engine: Watched, patience: Patience, may_stand_still: Callable[[], bool] = lambda: False
) -> str:
    """Watch an engine until it hangs, and return how it does.

    Args:
        engine: The engine.
        patience: How long it is waited for.
        may_stand_still: Whether it is well though no token comes: nobody asks it for anything, as
            not every engine's count of what runs is a fresh one, or it waits for others' memory.
    """
    loop = asyncio.get_running_loop()
    num_silent, num_tokens, moved = 0, -1, loop.time()
    while True:
        asked = loop.time()
        is_well = await engine.health(patience.health_seconds)
        num_silent = 0 if is_well else num_silent + 1
        if num_silent >= patience.num_silent:
            return f"its health was silent {num_silent} times for {patience.health_seconds:g} s"
        counters = None
        if is_well:
            with suppress(EngineDiedError, ValueError):  # no answer, or none that can be read
                counters = await engine.counters()
        now = loop.time()
        if counters is not None:
            is_at_rest = not counters.num_running or may_stand_still()
            if is_at_rest or counters.num_tokens != num_tokens:
                num_tokens, moved = counters.num_tokens, now
            elif now - moved >= patience.still_seconds:
                return (
                    f"it runs {counters.num_running} requests, and no token came for "
                    f"{now - moved:.0f} s"
                )
        await asyncio.sleep(max(asked + patience.health_seconds - now, 0.0))


async def well_again(engine: Watched, patience: Patience) -> None:
    """Wait until an engine says that it is well; one that has died never does."""
    while not await engine.health(patience.health_seconds):  # noqa: ASYNC110  nobody tells
        await asyncio.sleep(LOOK_SECONDS)
