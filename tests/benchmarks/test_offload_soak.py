"""The soak of offloading tells whole answers, those that it left, and what broke."""

import asyncio
import json
import random
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import offload
import pytest
from offload_soak import Soak, wrong_lines


def asked(num_tokens: int, *, num_out: int, num_read: int) -> str:
    """Return what becomes of a request whose answer has so many tokens."""
    lines = [{"choices": [{"token_ids": [7]}]} for _ in range(num_tokens)]
    text = "".join(f"data: {json.dumps(line)}\n\n" for line in [*lines, {"choices": []}])
    transport = httpx.MockTransport(lambda _: httpx.Response(200, text=text + "data: [DONE]\n\n"))
    bench: Any = {"elastic": SimpleNamespace(name="elastic")}

    async def ask() -> str:
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as session:
            soak = Soak(bench, random.Random(1))
            return await soak._ask(session, [1, 2], num_out, num_read)

    return asyncio.run(ask())


def test_an_answer_is_whole_or_left_or_an_error() -> None:
    assert asked(8, num_out=8, num_read=8) == "answered"
    assert asked(8, num_out=8, num_read=3) == "aborted"
    with pytest.raises(ValueError, match="5 of 8 tokens came"):
        asked(5, num_out=8, num_read=8)


def test_lines_of_a_log_that_say_that_something_broke_are_found(tmp_path: Path) -> None:
    server: Any = SimpleNamespace(log=tmp_path / "elastic.log")
    server.log.write_text("INFO ready\nRuntimeError: CUDA error: an illegal memory access\n")
    assert wrong_lines(server) == ["RuntimeError: CUDA error: an illegal memory access"]
    server.log.write_text("INFO ready\n")
    assert wrong_lines(server) == []


def test_a_row_that_takes_too_long_is_ended_and_one_that_does_not_is_not() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(TimeoutError, match="longer than 1 s"), offload.time_limit(1):
        signal.pause()
    with offload.time_limit(1):
        pass
    assert signal.alarm(0) == 0
    assert signal.getsignal(signal.SIGALRM) is before
