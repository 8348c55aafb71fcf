"""The soak of offloading tells what broke."""

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import offload
import pytest
from offload_soak import wrong_lines


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
