"""Whether an engine's first request waits for memory that nobody gives, as its log says."""

import asyncio
import re
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from kvcached_gateway.engines.last_words import log_end
from kvcached_gateway.errors import EngineStartError

__all__ = ["STARVED_SECONDS", "fed"]

# Pages of requests that end, and weights that yield, are there well before.
STARVED_SECONDS = 20
LOOK_SECONDS = 1.0
# What a scheduler says again and again while its requests wait (kvcached_core/engine/waiting.py).
WAITS = re.compile(r"kvcached: requests have been waiting for memory for (\d+) s: (.+)")


async def fed(work: Coroutine[Any, Any, str], log: Path) -> str:
    """Return what an engine answers, unless its log says that it waits for memory too long.

    An idle neighbour keeps its first page. Where such pages leave no room for a request, it would
    wait until its engine is given up, and its neighbours would stay: for them all is well.

    Args:
        work: The request and its answer; cancelled where it waits too long.
        log: The engine's log.

    Raises:
        EngineStartError: If it waits too long; the message says who holds the memory.
    """
    answer, wait = asyncio.ensure_future(work), asyncio.ensure_future(_starved(log))
    try:
        await asyncio.wait([answer, wait], return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        raise EngineStartError(wait.result(), is_out_of_memory=True)
    finally:
        for task in (answer, wait):
            task.cancel()
        await asyncio.gather(answer, wait, return_exceptions=True)


async def _starved(log: Path) -> str:
    """Wait until a log says that requests have waited too long, and return what it says of them."""
    while True:  # nobody tells what is written to a file
        for seconds, why in WAITS.findall(log_end(log)):
            if int(seconds) >= STARVED_SECONDS:
                return f"its first request waited {seconds} s for memory: {why}"
        await asyncio.sleep(LOOK_SECONDS)
