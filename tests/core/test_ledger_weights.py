"""Weights in the ledger: resident = used + cached + idle + weights, and who wakes first."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.waiting import await_that

from kvcached_core.ledger.file import ALLOCATED, RowKey
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.opening import ledger_directory
from kvcached_core.ledger.policy import Policy
from kvcached_core.ledger.room import free_bytes
from kvcached_core.ledger.view import InstanceView
from kvcached_core.ledger.weights import WeightsWish
from kvcached_core.units import MIB

PAGE = 16 * MIB
CAPACITY = 64 * PAGE


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(ledger_directory(tmp_path / "kv") / "host.ledger", CAPACITY) as opened:
        yield opened


def join(ledger: Ledger, name: str, needed: int = 0, policy: Policy | None = None) -> RowKey:
    """Register an instance whose weights, in pages, are not there yet."""
    row = ledger.register(name=name, engine="test", page_bytes=PAGE, policy=policy or Policy())
    ledger.describe_weights(row, needed * PAGE)
    return row


def hold(ledger: Ledger, row: RowKey, used: int, cached: int = 0) -> None:
    assert ledger.promise(row, (used + cached) * PAGE, PAGE) == (used + cached) * PAGE
    sizes = {"used_bytes": used * PAGE, "cached_bytes": cached * PAGE}
    ledger.settle(row, mapped_bytes=(used + cached) * PAGE, **sizes)


def seen(ledger: Ledger, row: RowKey) -> InstanceView:
    return next(view for view in ledger.view().instances if view.row == row)


def free(ledger: Ledger, row: RowKey) -> int:
    return ledger.free_bytes(row) // PAGE


def test_what_is_resident_is_used_cached_idle_or_weights(ledger: Ledger) -> None:
    row = join(ledger, "a", needed=20)
    hold(ledger, row, used=2, cached=1)
    ledger.settle_weights(row, mapped_bytes=20 * PAGE)
    ledger.settle(row, unmapped_bytes=0, used_bytes=PAGE, cached_bytes=PAGE)
    view = seen(ledger, row)
    assert view.resident_bytes == 23 * PAGE
    assert (view.used_bytes, view.cached_bytes, view.idle_bytes) == (PAGE, PAGE, PAGE)
    assert (view.weights_bytes, view.weights_needed_bytes) == (20 * PAGE, 20 * PAGE)
    ledger.settle(row, used_bytes=30 * PAGE, cached_bytes=0)
    assert (seen(ledger, row).used_bytes, seen(ledger, row).idle_bytes) == (3 * PAGE, 0)
    ledger.settle_weights(row, unmapped_bytes=8 * PAGE)
    assert (seen(ledger, row).weights_bytes, seen(ledger, row).resident_bytes) == (
        *(12 * PAGE, 15 * PAGE),
    )


def test_no_limit_and_no_floor_counts_weights(ledger: Ledger) -> None:
    row = join(ledger, "a", needed=20, policy=Policy(limit_bytes=8 * PAGE, floor_bytes=6 * PAGE))
    other = join(ledger, "b")
    ledger.settle_weights(row, mapped_bytes=20 * PAGE)
    assert ledger.wanted(row).asked_bytes == 0
    assert free(ledger, other) == 64 - 20 - 6
    assert ledger.room_bytes(row) == 8 * PAGE
    assert ledger.promise(row, 16 * PAGE, PAGE) == 8 * PAGE
    assert seen(ledger, row).excess_bytes == seen(ledger, row).unmet_floor_bytes == 0
    ledger.change_policy(row, limit_bytes=7 * PAGE)
    assert ledger.wanted(row).asked_bytes == PAGE


def test_a_trim_asks_for_no_weights(ledger: Ledger) -> None:
    row = join(ledger, "a", needed=20)
    hold(ledger, row, used=2, cached=3)
    ledger.settle_weights(row, mapped_bytes=20 * PAGE)
    assert ledger.ask(row, 64 * PAGE) == 3 * PAGE


def test_what_is_mapped_comes_out_of_what_was_announced(ledger: Ledger) -> None:
    row, other = join(ledger, "a", needed=20), join(ledger, "b")
    ledger.announce(row, 20 * PAGE, is_waking=True)
    allocated = ledger._words[ALLOCATED]
    for _ in range(5):
        ledger.settle_weights(row, mapped_bytes=4 * PAGE)
        assert free(ledger, other) == 44
    assert ledger._words[ALLOCATED] - allocated == 20 * PAGE
    assert (seen(ledger, row).static_bytes, seen(ledger, row).is_waking) == (0, False)


def test_the_first_to_wake_counts_as_free_what_later_ones_wait_for(ledger: Ledger) -> None:
    first, second, third = (join(ledger, name, needed=30) for name in "abc")
    ledger.announce(second, 30 * PAGE, is_waking=True)
    ledger.announce(first, 30 * PAGE, is_waking=True)
    assert [ledger.is_first_waker(row) for row in (first, second, third)] == [False, True, False]
    assert (free(ledger, second), free(ledger, first), free(ledger, third)) == (64, 34, 4)
    ledger.announce(second, 20 * PAGE, is_waking=True)  # again: it keeps its place
    assert ledger.is_first_waker(second)
    assert ledger.promise(second, CAPACITY, PAGE) == 64 * PAGE - 50 * PAGE  # KV comes after both


def test_what_is_announced_while_the_first_to_wake_counts_is_not_free_for_it(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, other = join(ledger, "a", needed=30), join(ledger, "b")
    hold(ledger, other, used=40)
    ledger.announce(first, 30 * PAGE, is_waking=True)
    with Ledger(ledger.path) as neighbour:
        second = join(neighbour, "c", needed=30)

        def announce_behind(*arguments: object, **named: object) -> int:
            found: int = free_bytes(*arguments, **named)  # type: ignore[arg-type]
            neighbour.announce(second, 30 * PAGE, is_waking=True)
            return found

        monkeypatch.setattr("kvcached_core.ledger.promises.free_bytes", announce_behind)
        assert free(ledger, first) == 24
        monkeypatch.undo()
        await_that(lambda: neighbour.free_bytes(second) < 0)
        assert free(ledger, first) == 24


def test_who_gives_weights_while_it_waits_for_more_keeps_its_place(ledger: Ledger) -> None:
    first, second = join(ledger, "a", needed=20), join(ledger, "b", needed=20)
    ledger.settle_weights(first, mapped_bytes=20 * PAGE)
    for row in (first, second):
        ledger.announce(row, 20 * PAGE, is_waking=True)
    ledger.settle_weights(first, unmapped_bytes=4 * PAGE)
    assert ledger.is_first_waker(first)
    ledger.settle_weights(first, mapped_bytes=4 * PAGE)
    assert ledger.is_first_waker(second)


def test_an_announcement_for_a_start_counts_for_who_wakes(ledger: Ledger) -> None:
    row, starting = join(ledger, "a", needed=30), join(ledger, "b")
    ledger.announce(row, 30 * PAGE, is_waking=True)
    ledger.announce(starting, 10 * PAGE)
    assert free(ledger, row) == 54


def test_who_wakes_comes_behind_all_that_do_whatever_the_clock_says(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = join(ledger, "a", needed=1), join(ledger, "b", needed=1)
    ledger.announce(second, PAGE, is_waking=True)
    monkeypatch.setattr(time, "time_ns", lambda: 1)
    ledger.announce(first, PAGE, is_waking=True)
    assert ledger.is_first_waker(second)
    assert not ledger.is_first_waker(first)


def end_by_mapping(ledger: Ledger, row: RowKey) -> list[RowKey]:
    return ledger.settle_weights(row, mapped_bytes=20 * PAGE)


def end_by_giving_up(ledger: Ledger, row: RowKey) -> list[RowKey]:
    return ledger.announce(row, 0)


@pytest.mark.parametrize("end", [end_by_mapping, end_by_giving_up])
def test_who_wakes_next_is_told_when_the_first_is_awake_or_gave_up(
    ledger: Ledger, end: Callable[[Ledger, RowKey], list[RowKey]]
) -> None:
    first, second = join(ledger, "a", needed=20), join(ledger, "b", needed=30)
    for row, num_pages in ((first, 20), (second, 30)):
        ledger.announce(row, num_pages * PAGE, is_waking=True)
        ledger.ask_peers(row, num_pages * PAGE, is_static=True)
    assert second in end(ledger, first)
    assert ledger.is_first_waker(second)


def test_who_died_while_it_woke_holds_nobody_up(ledger: Ledger) -> None:
    with Ledger(ledger.path) as of_other:
        other = join(of_other, "dies", needed=30)
        of_other.announce(other, 30 * PAGE, is_waking=True)
        row = join(ledger, "a", needed=40)
        ledger.announce(row, 40 * PAGE, is_waking=True)
        assert not ledger.is_first_waker(row)
    ledger.ask_peers(row, 40 * PAGE, is_static=True)
    assert ledger.is_first_waker(row)
    assert free(ledger, row) == 64


def test_requests_of_lower_priorities_stop_for_who_wakes_and_no_others(ledger: Ledger) -> None:
    rows = {
        priority: join(ledger, f"p{priority}", needed=8, policy=Policy(priority=priority))
        for priority in (-1, 0, 1)
    }
    hold(ledger, rows[-1], used=20)
    hold(ledger, rows[1], used=20)
    ledger.announce(rows[0], 40 * PAGE, is_waking=True)
    assert ledger.ask_peers(rows[0], 16 * PAGE, is_static=True) == [rows[-1]]
    assert ledger.wanted(rows[-1]).owed_bytes == 16 * PAGE
    assert ledger.wanted(rows[1]).owed_bytes == 0


def test_what_is_offered_is_asked_for_and_no_more_than_is_there(ledger: Ledger) -> None:
    asker, peer = join(ledger, "a"), join(ledger, "b", needed=20)
    ledger.settle_weights(peer, mapped_bytes=20 * PAGE)
    assert ledger.ask_peers(asker, 50 * PAGE) == []
    ledger.offer_weights(peer, 20 * PAGE)
    ledger.settle_weights(peer, unmapped_bytes=5 * PAGE)
    assert seen(ledger, peer).weights_offered_bytes == 15 * PAGE
    assert ledger.ask_peers(asker, 50 * PAGE) == [peer]
    assert ledger.wanted(peer).asked_bytes == 15 * PAGE


def test_weights_that_were_asked_for_are_on_their_way_until_they_are_gone(ledger: Ledger) -> None:
    asker, peer = join(ledger, "a"), join(ledger, "b", needed=20)
    ledger.settle_weights(peer, mapped_bytes=20 * PAGE)
    ledger.offer_weights(peer, 20 * PAGE)
    ledger.ask_peers(asker, 8 * PAGE)
    ledger.acknowledge(peer, 8 * PAGE)
    assert ledger.ask_peers(asker, 8 * PAGE) == []
    assert ledger.settle_weights(peer, unmapped_bytes=8 * PAGE) == [asker]
    assert seen(ledger, peer).coming_bytes == 0


def test_weights_are_expected_for_some_seconds_until_they_are_offered(ledger: Ledger) -> None:
    row = join(ledger, "a", needed=1)
    before_ns = time.time_ns()
    ledger.expect_weights(row, 60)
    until_ns = seen(ledger, row).weights_kept_until_ns
    assert before_ns + 60e9 <= until_ns <= time.time_ns() + 60e9
    ledger.expect_weights(row, 0)
    assert seen(ledger, row).weights_kept_until_ns == 0
    ledger.settle_weights(row, mapped_bytes=PAGE)
    ledger.offer_weights(row, PAGE, kept_until_ns=5)
    ledger.expect_weights(row, 60)
    assert seen(ledger, row).weights_kept_until_ns == 5


def test_a_wake_is_counted_with_what_it_took(ledger: Ledger) -> None:
    row = join(ledger, "a", needed=1)
    for milliseconds in (250, 300, 900, 4000):
        ledger.activated(row, milliseconds * 1_000_000)
    found = seen(ledger, row).activations
    assert (found.buckets, found.num, found.seconds) == ((1, 1, 1, 1), 4, 5.45)


def test_a_wish_stays_until_it_is_ended_and_a_later_one_longer(ledger: Ledger) -> None:
    row = join(ledger, "a", needed=1)
    notices = ledger.num_notices(row)
    ledger.set_wish(row, WeightsWish.SLEEP)
    assert ledger.num_notices(row) > notices
    assert ledger.weights_wish(row) is WeightsWish.SLEEP
    ledger.set_wish(row, WeightsWish.WAKE)
    ledger.end_wish(row, WeightsWish.SLEEP)
    assert ledger.weights_wish(row) is WeightsWish.WAKE
    ledger.end_wish(row, WeightsWish.WAKE)
    assert ledger.weights_wish(row) is WeightsWish.NONE


def test_a_start_does_not_wait_for_memory_that_is_idle_weights(ledger: Ledger) -> None:
    sleeper, starting = join(ledger, "a", needed=60), join(ledger, "b")
    ledger.settle_weights(sleeper, mapped_bytes=60 * PAGE)
    ledger.offer_weights(sleeper, 60 * PAGE)
    ledger.announce(starting, 30 * PAGE)
    assert ledger.ask_peers(starting, 26 * PAGE, is_static=True) == [sleeper]
    assert ledger.wanted(sleeper).asked_bytes == 26 * PAGE
