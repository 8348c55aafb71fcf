"""Our log lines in vLLM's log."""

import io
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from kvcached_vllm.log_lines import ENGINES, OURS, show_lines

pytestmark = pytest.mark.vllm


@dataclass
class Logs:
    """Our logger as in a process of vLLM, vLLM's, and what that shows."""

    ours: logging.Logger
    engines: logging.Logger
    shown: io.StringIO


@pytest.fixture
def make_logs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Logs]]:
    """Return what makes them in a test: before it, pytest puts handlers to loggers like them."""
    loggers = [logging.getLogger(name) for name in (OURS, ENGINES)]
    levels = [logger.level for logger in loggers]

    def make() -> Logs:
        for logger in loggers:
            monkeypatch.setattr(logger, "propagate", False)
            monkeypatch.setattr(logger, "handlers", [])
            logger.setLevel(logging.NOTSET)
        return Logs(*loggers, io.StringIO())

    yield make
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def configure(logs: Logs) -> None:
    """Let vLLM show lines of level INFO and above, as it does by default."""
    handler = logging.StreamHandler(logs.shown)
    handler.setFormatter(logging.Formatter("VLLM %(levelname)s %(message)s"))
    logs.engines.addHandler(handler)
    logs.engines.setLevel(logging.INFO)


@pytest.mark.parametrize("is_late", [False, True], ids=["before", "after"])
def test_our_lines_are_among_vllms_once_and_as_it_writes_them_whenever_it_says_where(
    make_logs: Callable[[], Logs], *, is_late: bool
) -> None:
    logs = make_logs()
    if not is_late:
        configure(logs)
    show_lines()
    show_lines()
    if is_late:
        configure(logs)
    logs.ours.info("kvcached: no file was read")
    logs.ours.warning("kvcached: weights stay")
    assert logs.shown.getvalue().splitlines() == [
        "VLLM INFO kvcached: no file was read",
        "VLLM WARNING kvcached: weights stay",
    ]


def test_where_vllm_shows_warnings_alone_so_do_we(make_logs: Callable[[], Logs]) -> None:
    logs = make_logs()
    configure(logs)
    show_lines()
    logs.engines.setLevel(logging.WARNING)
    logs.ours.info("kvcached: no file was read")
    logs.ours.warning("kvcached: weights stay")
    assert logs.shown.getvalue() == "VLLM WARNING kvcached: weights stay\n"


def test_where_somebody_has_said_where_our_lines_go_they_go_nowhere_else(
    make_logs: Callable[[], Logs],
) -> None:
    logs, elsewhere = make_logs(), io.StringIO()
    configure(logs)
    logs.ours.addHandler(logging.StreamHandler(elsewhere))
    show_lines()
    logs.ours.error("kvcached: once")
    assert (elsewhere.getvalue(), logs.shown.getvalue()) == ("kvcached: once\n", "")
