"""An engine whose first request waits for memory that nobody gives is given up in time."""

import asyncio
import logging
from pathlib import Path

import pytest

from kvcached_core.engine.waiting import LOG_SECONDS, WaitingLog
from kvcached_gateway.engines import starving
from kvcached_gateway.engines.last_words import log_end
from kvcached_gateway.engines.starving import STARVED_SECONDS, fed
from kvcached_gateway.errors import EngineStartError

NUM_LOOKS = 3
MISSING = "4 MiB of 4 MiB are missing on host; it is held by a (4 MiB), b (4 MiB)"


def write_wait(log: Path, caplog: pytest.LogCaptureFixture, seconds: float) -> None:
    """Write what an engine logs whose requests have waited for so long."""
    times = iter([LOG_SECONDS * number for number in range(int(seconds / LOG_SECONDS) + 1)])
    waiting = WaitingLog(lambda: MISSING, lambda: next(times))
    with caplog.at_level(logging.WARNING, "kvcached"):
        for _ in range(int(seconds / LOG_SECONDS) + 1):
            waiting.refused()
    lines = (f"(EngineCore pid=7) WARNING 11-29 [waiting.py:97] {text}" for text in caplog.messages)
    log.write_text("\n".join(lines))


async def never() -> str:
    return await asyncio.get_running_loop().create_future()


def test_a_request_that_waits_too_long_is_a_start_out_of_memory_that_says_who_holds_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = tmp_path / "log"
    write_wait(log, caplog, STARVED_SECONDS)
    with pytest.raises(EngineStartError) as raised:
        asyncio.run(fed(never(), log))
    assert raised.value.is_out_of_memory
    assert str(raised.value) == f"its first request waited 20 s for memory: {MISSING}"


def test_a_request_that_waits_for_a_while_is_answered(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"

    write_wait(log, caplog, STARVED_SECONDS - LOG_SECONDS)
    assert "have been waiting for memory for 10 s" in log.read_text()
    looks = 0

    def look(file: Path) -> str:
        nonlocal looks
        looks += 1
        return log_end(file)

    monkeypatch.setattr(starving, "log_end", look)
    monkeypatch.setattr(starving, "LOOK_SECONDS", 0.0)

    async def answer() -> str:
        while looks < NUM_LOOKS:  # noqa: ASYNC110  a look calls nobody
            await asyncio.sleep(0)
        return "ten"

    assert asyncio.run(fed(answer(), log)) == "ten"


def test_what_the_request_raises_is_raised(tmp_path: Path) -> None:
    async def fail() -> str:
        raise EngineStartError("it answered 500 to one token")

    with pytest.raises(EngineStartError, match="it answered 500") as raised:
        asyncio.run(fed(fail(), tmp_path / "log"))
    assert not raised.value.is_out_of_memory
