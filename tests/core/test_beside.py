"""Weights that come back beside neighbours: announced, in turn, where room can come."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.seats import view_of
from helpers.waiting import await_that

from kvcached_core.config import HOST, Config, read_config
from kvcached_core.engine import beside
from kvcached_core.engine.beside import Turn
from kvcached_core.engine.instance import Instance
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.view import InstanceView
from kvcached_core.ledger.weights import WeightsWish
from kvcached_core.memory.devices import Device
from kvcached_core.units import MIB

PAGE = 16 * MIB
POOL = Device(HOST, "host", 8 * PAGE)
OTHER_POOL = Device(HOST, "other", 8 * PAGE)


class Engine:
    """An instance with weights; it maps and gives what a test says."""

    def __init__(self, config: Config, name: str, devices: list[Device]) -> None:
        self.instance = Instance(
            devices, config, name=name, default_name="", engine="test", on_ring=lambda: None
        )
        self.instance.describe(page_bytes=PAGE, num_pages=8)
        self.beside = self.instance.beside
        self.beside.describe_weights(4 * PAGE)
        self.devices = list(dict.fromkeys(devices))

    def ask(self, num_pages: int = 4) -> Turn:
        """Look whether it may wake, whenever the test says so."""
        self.beside._look_at = 0.0
        return self.beside.ask_to_wake(num_pages * PAGE)

    def use(self, *, used: int = 0, cached: int = 0) -> None:
        """Have so many pages for KV, promised before."""
        num_held = self.view(self.devices[0]).held_bytes // PAGE
        num_more = used + cached - num_held
        if num_more > 0:
            assert self.instance.promise(num_more, is_urgent=False) == num_more
        self._settle(
            mapped_bytes=max(num_more, 0) * PAGE,
            unmapped_bytes=max(-num_more, 0) * PAGE,
            used_bytes=used * PAGE,
            cached_bytes=cached * PAGE,
        )

    def map_weights(self, num_pages: int) -> None:
        for ledger, device in self._ledgers():
            num_bytes = num_pages * PAGE
            ledger.settle_weights(
                self.instance.seat(device).row,
                mapped_bytes=max(num_bytes, 0),
                unmapped_bytes=max(-num_bytes, 0),
            )

    def wake(self, num_pages: int = 4) -> None:
        assert self.ask(num_pages) is Turn.NOW
        self.map_weights(num_pages)
        self.beside.woke(2000, 1000)
        self.beside.stop_waking()

    def view(self, device: Device = POOL) -> InstanceView:
        return view_of(self.instance, device)

    def num_asked(self) -> int:
        return self.view().asked_bytes // PAGE

    def _settle(self, **changes: int) -> None:
        for ledger, device in self._ledgers():
            ledger.settle(self.instance.seat(device).row, **changes)

    def _ledgers(self) -> Iterator[tuple[Ledger, Device]]:
        for device in self.devices:
            with Ledger(Path(self.instance.seat(device).ledger_path)) as ledger:
                yield ledger, device


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Engine]]:
    opened: list[Engine] = []

    def make(name: str, devices: list[Device] | None = None, **settings: str) -> Engine:
        named = {f"KVCACHED_{key.upper()}": text for key, text in settings.items()}
        config = read_config({"KVCACHED_DIR": str(tmp_path / "kv"), **named})
        opened.append(Engine(config, name, devices or [POOL]))
        return opened[-1]

    yield make
    for engine in opened:
        engine.instance.close()


def test_where_there_is_room_it_is_announced_and_is_over_when_all_is_there(
    start: Callable[..., Engine],
) -> None:
    one, other = start("one"), start("other")
    assert one.ask() is Turn.NOW
    assert one.view().static_bytes == 4 * PAGE
    assert one.view().is_waking
    assert other.instance.promise(8, is_urgent=False) == 4
    one.map_weights(4)
    one.beside.woke(2_000_000, 1_000_000)
    one.beside.stop_waking()
    view = one.view()
    assert (view.static_bytes, view.waiting_bytes, view.is_waking) == (0, 0, False)
    assert (view.activations.num, view.activations.seconds) == (1, 0.002)


def test_neighbours_are_asked_for_what_is_missing_and_for_no_more(
    start: Callable[..., Engine],
) -> None:
    waker, neighbour = start("waker"), start("neighbour")
    neighbour.use(used=1, cached=6)
    assert waker.ask() is Turn.NEXT
    assert neighbour.num_asked() == 3
    assert waker.view().waiting_bytes == 3 * PAGE
    neighbour.use(used=1, cached=3)
    assert waker.ask() is Turn.NOW


def test_room_of_one_that_was_killed_is_found_while_nothing_else_could_come(
    start: Callable[..., Engine],
) -> None:
    waker = start("waker")
    with Ledger(Path(waker.instance.seat(POOL).ledger_path)) as ledger:
        row = ledger.register(name="killed", engine="test")
        ledger.announce(row, 6 * PAGE)
        assert waker.ask() is Turn.LATER
        assert not waker.view().is_waking
    # Its ledger was closed without a word, as a kill does.
    await_that(lambda: waker.ask() is Turn.NOW)


@pytest.mark.parametrize("devices", [[POOL], [POOL, OTHER_POOL]])
def test_of_two_that_wake_the_first_comes_first_and_then_the_second(
    start: Callable[..., Engine], devices: list[Device]
) -> None:
    neighbour = start("neighbour", devices)
    first, second = start("first", devices), start("second", devices[::-1])
    neighbour.use(used=1, cached=6)
    assert first.ask() is Turn.NEXT
    assert second.ask(3) is Turn.LATER
    assert second.view().is_waking
    neighbour.use(used=1, cached=3)
    assert second.ask(3) is Turn.LATER
    first.wake()
    assert second.ask(3) is Turn.NEXT
    neighbour.use(used=1)
    second.wake(3)


def test_who_is_first_on_one_device_alone_holds_nobody_up_on_the_next(
    start: Callable[..., Engine],
) -> None:
    both, one = start("both", [POOL, OTHER_POOL]), start("one", [OTHER_POOL])
    start("before").ask(7)
    assert both.ask() is Turn.LATER
    assert both.view(OTHER_POOL).static_bytes == 0
    assert one.ask() is Turn.NOW


def test_room_is_needed_on_all_devices(start: Callable[..., Engine]) -> None:
    waker, neighbour = start("waker", [POOL, OTHER_POOL]), start("neighbour", [OTHER_POOL])
    neighbour.use(used=1, cached=6)
    assert waker.ask() is Turn.NEXT
    assert waker.view().static_bytes == waker.view(OTHER_POOL).static_bytes == 4 * PAGE
    neighbour.use(used=1, cached=3)
    assert waker.ask() is Turn.NOW


def test_ranks_on_one_device_need_room_each(start: Callable[..., Engine]) -> None:
    waker, neighbour = start("waker", [POOL, POOL]), start("neighbour")
    neighbour.use(used=1)
    assert waker.ask(4) is Turn.LATER  # page 0 of a neighbour never goes
    assert waker.ask(3) is Turn.NOW
    assert waker.view().static_bytes == 6 * PAGE


def test_room_that_cannot_come_is_left_to_those_who_have_to_end_first(
    start: Callable[..., Engine],
) -> None:
    waker, busy = start("waker"), start("busy")
    busy.wake()
    busy.use(used=1)
    assert waker.ask(5) is Turn.LATER
    assert (waker.view().static_bytes, waker.view().is_waking) == (0, False)
    assert busy.instance.promise(3, is_urgent=True) == 3
    busy.instance.cancel(3)
    busy.beside._kept_until_ns = 0
    busy.beside.offer_weights(4 * PAGE)
    assert waker.ask(5) is Turn.NEXT
    assert busy.num_asked() == 2
    busy.beside.offer_weights(0)
    assert waker.ask(5) is Turn.LATER
    assert (waker.view().static_bytes, waker.view().waiting_bytes) == (0, 0)


def test_what_requests_hold_may_come_since_they_end(start: Callable[..., Engine]) -> None:
    waker, busy = start("waker"), start("busy")
    busy.use(used=7)
    assert waker.ask() is Turn.NEXT
    assert busy.num_asked() == 0
    assert busy.instance.promise(1, is_urgent=True) == 0
    busy.use(used=4)
    assert waker.ask() is Turn.NOW


def test_what_a_floor_guarantees_does_not_come(start: Callable[..., Engine]) -> None:
    waker, other = start("waker"), start("other", floor=str(5 * PAGE))
    other.use(used=6)
    assert waker.ask(4) is Turn.LATER
    assert waker.ask(3) is Turn.NEXT


@pytest.mark.parametrize(("priority", "turn"), [(0, Turn.LATER), (1, Turn.NEXT)])
def test_weights_that_came_back_are_kept_for_a_while_but_for_a_higher_priority(
    start: Callable[..., Engine], priority: int, turn: Turn
) -> None:
    waker, other = start("waker", priority=str(priority)), start("other")
    other.wake()
    other.beside.offer_weights(4 * PAGE)
    kept_seconds = other.view().weights_kept_until_ns / 1e9 - time.time()
    assert 9 < kept_seconds <= 10
    assert waker.ask(5) is turn


def test_weights_that_took_long_are_kept_for_longer(start: Callable[..., Engine]) -> None:
    engine = start("one")
    assert engine.ask() is Turn.NOW
    engine.map_weights(4)
    engine.beside.woke(60_000_000_000, 2_000_000_000)
    engine.beside.offer_weights(PAGE)
    kept_seconds = engine.view().weights_kept_until_ns / 1e9 - time.time()
    assert 59 < kept_seconds <= 60  # of what the waiting took, nothing counts


def test_each_rank_counts_with_its_own_weights_on_its_own_device(
    start: Callable[..., Engine],
) -> None:
    engine = start("one", [POOL, OTHER_POOL, OTHER_POOL])
    ours = engine.beside
    ours.describe_weights([PAGE, 2 * PAGE, 3 * PAGE])
    views = engine.view(POOL), engine.view(OTHER_POOL)
    assert [view.weights_needed_bytes for view in views] == [PAGE, 5 * PAGE]
    assert ours.ask_to_wake([0, PAGE, 2 * PAGE]) is Turn.NOW
    assert [engine.view(one).static_bytes for one in (POOL, OTHER_POOL)] == [0, 3 * PAGE]
    ours.stop_waking()
    engine.map_weights(4)
    ours.offer_weights([PAGE, 0, 2 * PAGE])
    views = engine.view(POOL), engine.view(OTHER_POOL)
    assert [view.weights_offered_bytes for view in views] == [PAGE, 2 * PAGE]


def test_how_long_weights_are_kept_can_be_set(start: Callable[..., Engine]) -> None:
    engine = start("one", weights_kept_seconds="0")
    assert engine.ask() is Turn.NOW
    engine.map_weights(4)
    engine.beside.woke(60_000_000_000, 2_000_000_000)
    engine.beside.offer_weights(PAGE)
    assert engine.view().weights_kept_until_ns <= time.time_ns()


def test_a_loop_that_waits_neither_spins_nor_looks_in_each_turn(
    start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    waker, busy = start("waker"), start("busy")
    busy.use(used=7)
    looks: list[Turn] = []
    look = waker.beside._look
    monkeypatch.setattr(waker.beside, "_look", lambda: looks.append(look()) or looks[-1])
    monkeypatch.setattr(beside, "LOOK_SECONDS", 1000.0)
    started_at = time.monotonic()
    assert [waker.beside.ask_to_wake(4 * PAGE) for _ in range(20)] == [Turn.NEXT] * 20
    assert time.monotonic() - started_at >= 18 * beside.POLL_SECONDS
    assert len(looks) == 1
    waker.instance._on_ring()
    waker.beside.ask_to_wake(4 * PAGE)
    assert len(looks) == 2


def test_who_leaves_while_it_wakes_leaves_nothing_announced(start: Callable[..., Engine]) -> None:
    waker, other = start("waker"), start("other")
    assert waker.ask(6) is Turn.NOW
    assert other.ask(3) is Turn.LATER
    waker.instance.close()
    assert other.ask(8) is Turn.NOW


def test_a_wake_that_is_given_up_leaves_nothing_announced(start: Callable[..., Engine]) -> None:
    waker, other = start("waker"), start("other")
    other.use(used=4)
    assert waker.ask(6) is Turn.NEXT
    waker.beside.stop_waking()
    view = waker.view()
    assert (view.static_bytes, view.waiting_bytes, view.is_waking) == (0, 0, False)
    assert other.instance.promise(4, is_urgent=True) == 4


def test_while_the_ledger_is_locked_for_long_a_wake_waits(start: Callable[..., Engine]) -> None:
    waker, other = start("waker"), start("other")
    with Ledger(Path(other.instance.seat(POOL).ledger_path)) as ledger:
        ledger._enter_patiently()
        assert waker.ask() is Turn.LATER
        ledger._exit()
    assert waker.ask() is Turn.NOW


def test_a_wish_is_read_on_any_device_and_is_over_when_it_is_fulfilled(
    start: Callable[..., Engine],
) -> None:
    engine = start("one", [POOL, OTHER_POOL])
    assert engine.beside.wish() is WeightsWish.NONE
    seat = engine.instance.seat(OTHER_POOL)
    with Ledger(Path(seat.ledger_path)) as ledger:
        ledger.set_wish(seat.row, WeightsWish.SLEEP)
    assert engine.instance.has_news()
    assert engine.beside.wish() is WeightsWish.SLEEP
    engine.beside.end_wish(WeightsWish.SLEEP)
    assert engine.beside.wish() is WeightsWish.NONE


def test_what_is_missing_is_explained_with_who_holds_it(start: Callable[..., Engine]) -> None:
    waker, busy = start("waker"), start("busy")
    busy.use(used=6)
    waker.ask(4)
    assert waker.beside.explain_shortage() == (
        "32 MiB of 64 MiB are missing on host; it is held by busy (96 MiB)"
    )
