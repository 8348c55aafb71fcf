"""The log lines of an instance whose requests wait for memory."""

import logging

import pytest

from kvcached_core.engine.waiting import Refusals, WaitingLog


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


def test_only_as_many_pages_as_were_refused_are_refused_again_until_somebody_rings() -> None:
    refusals = Refusals(lambda: "nobody")
    assert not refusals.is_refused(4)
    refusals.refuse(4)
    assert refusals.is_refused(4)
    assert refusals.is_refused(5)
    assert not refusals.is_refused(3)
    refusals.forget()
    assert not refusals.is_refused(4)


def test_peers_are_asked_once_until_somebody_rings() -> None:
    refusals = Refusals(lambda: "nobody")
    assert refusals.may_ask()
    assert not refusals.may_ask()
    refusals.forget()
    assert refusals.may_ask()


def test_what_nobody_waits_for_any_more_may_be_asked_for_at_once() -> None:
    refusals = Refusals(lambda: "nobody")
    refusals.refuse(1)
    refusals.end()
    assert not refusals.is_refused(1)
