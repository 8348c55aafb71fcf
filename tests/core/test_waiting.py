"""The log lines of an instance whose requests wait for memory."""

import logging

import pytest

from kvcached_core.engine.waiting import WaitingLog


class Clock:
    """Seconds that a test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_wait_is_said_every_ten_seconds_with_its_length_and_who_holds_the_memory(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    log = WaitingLog(lambda: "64 MiB are missing", clock)
    with caplog.at_level(logging.WARNING, "kvcached"):
        for seconds in (0, 9, 10, 15, 19, 20):
            clock.now = 100.0 + seconds
            log.refused()
    texts = [record.getMessage() for record in caplog.records]
    assert [text.split("for memory for ")[1] for text in texts] == [
        "10 s: 64 MiB are missing",
        "20 s: 64 MiB are missing",
    ]


def test_a_wait_that_is_over_is_not_counted_to_the_next_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    log = WaitingLog(lambda: "", clock)
    log.refused()
    log.over()
    clock.now += 11
    log.refused()
    clock.now += 9
    log.refused()
    assert caplog.records == []
