"""Room for an engine that starts: its turn, what it waits for, and what it says."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from kvcached_core.engine import starting
from kvcached_core.engine.starting import Start, StartLine, make_room_to_start
from kvcached_core.ledger.expected import Patience, num_starting
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.opening import ledger_directory
from kvcached_core.ledger.policy import Policy
from kvcached_core.ledger.shortage import Need, Shortage
from kvcached_core.ledger.view import InstanceView
from kvcached_core.units import MIB

PAGE = 16 * MIB
NUM_PAGES = 16
NUM_WEIGHTS = 8
START = Start(PAGE, may_yield=True)


class Engine:
    """A row on each of some devices, which does what a test says."""

    def __init__(self, ledgers: list[Ledger], name: str, priority: int) -> None:
        policy = Policy(priority=priority)
        self.rows = [
            (ledger, ledger.register(name=name, engine="test", page_bytes=PAGE, policy=policy))
            for ledger in ledgers
        ]
        self.ledger, self.row = self.rows[0]

    def needs(self, num_pages: int = NUM_WEIGHTS) -> list[Need]:
        return [Need(ledger, row, num_pages * PAGE) for ledger, row in self.rows]

    def line(self, num_pages: int = NUM_WEIGHTS) -> StartLine:
        return StartLine(self.needs(num_pages), START)

    def serve(self, *, used: int = 1, weights: int = NUM_WEIGHTS) -> None:
        """Have requests, and weights that are not offered."""
        for ledger, row in self.rows:
            assert ledger.promise(row, used * PAGE, PAGE) == used * PAGE
            ledger.settle(row, mapped_bytes=used * PAGE, used_bytes=used * PAGE, cached_bytes=0)
            ledger.settle_weights(row, mapped_bytes=weights * PAGE)

    def copy(self, seconds: float = 60) -> None:
        for ledger, row in self.rows:
            ledger.expect_weights(row, seconds)

    def offer(self, kept_seconds: float = 0) -> None:
        until_ns = time.time_ns() + round(kept_seconds * 1e9) if kept_seconds else 0
        for ledger, row in self.rows:
            ledger.offer_weights(row, self.view().weights_bytes, until_ns)

    def give(self) -> None:
        """Give of the weights what is asked for."""
        for ledger, row in self.rows:
            ledger.settle_weights(row, unmapped_bytes=ledger.wanted(row).asked_bytes)
            ledger.acknowledge(row)

    def view(self) -> InstanceView:
        return next(view for view in self.ledger.view().instances if view.row == self.row)

    def num_asked(self) -> int:
        return self.view().asked_bytes // PAGE


class Script(threading.Event):
    """What happens while a start waits, one thing at each of its looks; that is its clock."""

    def __init__(self, *happenings: Callable[[], object]) -> None:
        super().__init__()
        self._happenings = list(happenings)
        self.num_looks = 0

    def wait(self, _seconds: float | None = None) -> bool:
        self.num_looks += 1
        assert self.num_looks < 100, "it waits for ever"
        if self._happenings:
            self._happenings.pop(0)()
        return True


Make = Callable[..., Engine]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    folder = ledger_directory(tmp_path / "kv")
    with ExitStack() as undo:

        def made(name: str, *, num_devices: int = 1, priority: int = 0) -> Engine:
            ledgers = [
                undo.enter_context(Ledger(folder / f"{device}.ledger", NUM_PAGES * PAGE))
                for device in range(num_devices)
            ]
            return Engine(ledgers, name, priority)

        yield made


def start(engine: Engine, *happenings: Callable[[], object]) -> Shortage | None:
    """Have an engine start that looks twice in vain, and longer for what is on its way."""
    script = Script(*happenings)
    patience = Patience(2, clock=lambda: script.num_looks)
    return make_room_to_start(engine.needs(), script, START, patience)


def test_where_there_is_room_it_is_announced_at_once_and_others_wait_for_its_weights(
    make: Make,
) -> None:
    new = make("new")
    assert start(new) is None
    view = new.view()
    assert (view.static_bytes, view.is_waking) == (NUM_WEIGHTS * PAGE, False)
    assert view.weights_kept_until_ns > time.time_ns()


def test_a_start_waits_for_a_copy_and_then_for_what_is_given(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(starting, "FIRST_LOG_SECONDS", 0.0)
    new, busy = make("new"), make("busy")
    busy.serve()
    busy.copy()
    assert start(new, *[busy.copy] * 20, busy.offer, busy.give) is None
    assert busy.view().weights_bytes == (NUM_PAGES - 1 - NUM_WEIGHTS) * PAGE
    line = caplog.messages[0]
    assert "16 MiB of 128 MiB are missing on 0; it is held by busy (144 MiB)" in line
    assert "it waits for the weights of busy (128 MiB, being copied to host memory)" in line


def test_a_start_does_not_wait_for_a_copy_that_fails_and_says_who_holds_the_memory(
    make: Make,
) -> None:
    new, busy = make("new"), make("busy")
    busy.serve()
    busy.copy()
    shortage = start(new, lambda: busy.copy(0))
    assert str(shortage) == ("16 MiB of 128 MiB are missing on 0; it is held by busy (144 MiB)")
    assert new.view().static_bytes == NUM_WEIGHTS * PAGE  # the start goes on
    assert (new.view().is_waking, new.view().waiting_bytes) == (False, 0)


def test_a_start_does_not_wait_for_who_keeps_its_weights(make: Make) -> None:
    new, keeps = make("new"), make("keeps")
    keeps.serve(used=NUM_PAGES, weights=0)
    assert start(new) is not None


def test_a_peer_that_dies_while_it_copies_leaves_its_room(make: Make) -> None:
    new, dies = make("new"), make("dies")
    dies.serve()
    dies.copy()
    assert start(new, *[dies.copy] * 20, dies.ledger.close) is None


def test_weights_that_are_kept_for_a_while_are_waited_for(make: Make) -> None:
    new, awake = make("new"), make("awake")
    awake.serve()
    awake.offer(kept_seconds=60)
    assert start(new, *[lambda: None] * 20, awake.offer, awake.give) is None


def test_a_higher_priority_has_them_at_once(make: Make) -> None:
    new, awake = make("new", priority=1), make("awake")
    awake.serve()
    awake.offer(kept_seconds=60)
    assert start(new, awake.give) is None


@pytest.mark.parametrize("priority", [0, 1])
def test_requests_do_not_stop_for_a_start(make: Make, priority: int) -> None:
    new, busy = make("new", priority=priority), make("busy")
    busy.serve(used=10, weights=0)
    assert start(new) is not None
    wanted = busy.ledger.wanted(busy.row)
    assert (wanted.asked_bytes, wanted.owed_bytes) == (0, 0)


def test_who_has_to_wait_announces_nothing(make: Make) -> None:
    new, busy = make("new"), make("busy")
    busy.serve()
    busy.copy()
    assert not new.line().look()
    assert busy.ledger.promise(busy.row, 7 * PAGE, PAGE) == 7 * PAGE


def test_what_was_announced_is_taken_back_when_it_cannot_come_any_more(make: Make) -> None:
    new, busy = make("new"), make("busy")
    busy.serve()
    busy.offer()
    line = new.line()
    assert not line.look()
    assert (new.view().is_waking, busy.num_asked()) == (True, 1)
    busy.ledger.offer_weights(busy.row, 0)
    assert not line.look()
    view = new.view()
    assert (view.static_bytes, view.waiting_bytes, view.is_waking) == (0, 0, False)


def test_of_two_that_start_the_first_has_its_room_before_anybody_is_asked_for_the_second(
    make: Make,
) -> None:
    busy = make("busy")
    busy.serve(weights=10)
    busy.offer()
    first, second = make("first"), make("second")
    lines = first.line(), second.line(5)
    assert [line.look() for line in lines] == [False, False]
    assert busy.num_asked() == 3
    busy.give()
    busy.offer()
    assert not lines[1].look()
    assert lines[0].look()
    assert not lines[1].look()
    assert second.view().is_waking


def test_a_start_leaves_room_for_the_first_pages_of_those_that_load(make: Make) -> None:
    first, second = make("first"), make("second")
    assert first.line().look()
    assert not second.line(NUM_PAGES - NUM_WEIGHTS - 1).look()
    assert second.line(NUM_PAGES - NUM_WEIGHTS - 2).look()
    assert first.ledger.promise(first.row, PAGE, PAGE) == PAGE
    assert second.ledger.promise(second.row, PAGE, PAGE) == PAGE


def test_the_first_page_of_who_entered_since_a_look_is_left_out_of_the_room(make: Make) -> None:
    first, second = make("first"), make("second")

    def enter_first(_need: Need) -> bool:
        assert first.view().static_bytes or first.line().look()
        return True

    needs = second.needs(NUM_PAGES - NUM_WEIGHTS - 1)
    assert not StartLine(needs, START, enter_first).look()


def test_who_leaves_the_line_with_room_is_seen_as_one_that_loads_at_once(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = make("first"), make("second")
    announce, seen = Ledger.announce, list[int]()

    def watched(ledger: Ledger, *args: Any, **kwargs: Any) -> Any:
        result = announce(ledger, *args, **kwargs)
        if not first.view().is_waking:
            view = ledger.view()
            own = next(one for one in view.instances if one.row == second.row)
            seen.append(num_starting(view, own, time.time_ns()))
        return result

    monkeypatch.setattr(Ledger, "announce", watched)
    assert first.line().look()
    assert seen == [1]


def test_a_start_on_two_devices_has_room_on_both_or_waits(make: Make) -> None:
    busy = make("busy")
    new = make("new", num_devices=2)
    busy.serve()
    busy.copy()
    assert start(new, busy.offer, busy.give) is None
    assert [ledger.view().instances[-1].static_bytes for ledger, _ in new.rows] == [
        NUM_WEIGHTS * PAGE
    ] * 2


def test_two_on_two_devices_never_hold_half_of_what_they_need(make: Make) -> None:
    busy = make("busy", num_devices=2)
    busy.serve()
    busy.offer()
    first, second = make("first", num_devices=2), make("second", num_devices=2)
    lines = first.line(), second.line()
    assert [line.look() for line in lines] == [False, False]
    on_second = [one for one in second.rows[1][0].view().instances if one.name == "second"]
    assert on_second[0].static_bytes == 0
