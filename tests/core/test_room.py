"""Waking beside neighbours: room is announced and asked for, or the announcement goes back."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.seats import view_of

from kvcached_core import control
from kvcached_core.config import HOST, Config, read_config
from kvcached_core.engine.instance import Instance
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.view import InstanceView
from kvcached_core.memory.devices import Device
from kvcached_core.units import MIB

PAGE = 16 * MIB
POOL = Device(HOST, "host", 8 * PAGE)
OTHER_POOL = Device(HOST, "other", 8 * PAGE)


class Engine:
    """An instance that gives what it has cached when it is asked."""

    def __init__(self, config: Config, name: str, devices: list[Device]) -> None:
        self.is_deaf = False
        self.asked = threading.Event()
        self.instance = Instance(
            devices, config, name=name, default_name="", engine="test", on_ring=self.answer
        )
        self.instance.describe(page_bytes=PAGE, num_pages=8)
        self.num_cached = self.num_used = 0
        self.devices = list(dict.fromkeys(devices))

    def hold(self, *, num_cached: int = 0, num_used: int = 0) -> None:
        assert self.instance.promise(num_cached + num_used, is_urgent=False)
        self.num_cached, self.num_used = num_cached, num_used
        self.settle(mapped_bytes=(num_cached + num_used) * PAGE)

    def settle(self, **changes: int) -> None:
        for device in self.devices:
            seat = self.instance.seat(device)
            with Ledger(Path(seat.ledger_path)) as ledger:
                ledger.settle(
                    seat.row,
                    used_bytes=self.num_used * PAGE,
                    cached_bytes=self.num_cached * PAGE,
                    **changes,
                )

    def answer(self) -> None:
        self.asked.set()
        if self.is_deaf:
            return
        num_given = min(self.instance.wanted_pages()[0], self.num_cached)
        if num_given:
            self.num_cached -= num_given
            self.instance.acknowledge(num_given)
            self.settle(unmapped_bytes=num_given * PAGE)

    def view(self, device: Device = POOL) -> InstanceView:
        return view_of(self.instance, device)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Engine]]:
    opened: list[Engine] = []

    def make(name: str, devices: list[Device] | None = None, **settings: str) -> Engine:
        config = read_config({"KVCACHED_DIR": str(tmp_path / "kv"), **settings})
        opened.append(Engine(config, name, devices or [POOL]))
        return opened[-1]

    yield make
    for engine in opened:
        engine.instance.close()


def test_neighbours_give_their_cache_to_who_wakes_and_get_none_of_it_back(
    start: Callable[..., Engine],
) -> None:
    sleeper, neighbour = start("sleeper"), start("neighbour")
    neighbour.hold(num_cached=8)
    assert sleeper.instance.beside.make_room(5 * PAGE, 10.0) is None
    assert neighbour.view().resident_bytes == 3 * PAGE
    assert neighbour.instance.promise(1, is_urgent=False) == 0
    assert sleeper.view().waiting_bytes == 0


def test_who_wakes_is_not_promised_pages_where_its_weights_will_lie(
    start: Callable[..., Engine],
) -> None:
    sleeper = start("sleeper")
    assert sleeper.instance.beside.make_room(5 * PAGE, 10.0) is None
    assert sleeper.instance.room_pages() == 3
    assert sleeper.instance.promise(8, is_urgent=False) == 3
    sleeper.instance.beside.announce(0)
    assert sleeper.instance.promise(8, is_urgent=False) == 5


def test_without_room_nothing_stays_announced_and_the_holders_are_named(
    start: Callable[..., Engine],
) -> None:
    sleeper, busy, small = start("sleeper"), start("busy"), start("small")
    busy.hold(num_used=5)
    small.hold(num_used=1)
    shortage = sleeper.instance.beside.make_room(4 * PAGE, patience_seconds=0.0)
    assert shortage is not None
    assert (shortage.device, shortage.needed_bytes, shortage.missing_bytes) == (
        *("host", 4 * PAGE, 2 * PAGE),
    )
    assert shortage.holders == (("busy", 5 * PAGE), ("small", PAGE))
    assert str(shortage) == (
        "32 MiB of 64 MiB are missing on host; it is held by busy (80 MiB), small (16 MiB)"
    )
    assert (sleeper.view().static_bytes, sleeper.view().waiting_bytes) == (0, 0)
    assert small.instance.promise(2, is_urgent=False) == 2


def test_a_refusal_on_one_device_leaves_nothing_announced_on_the_other(
    start: Callable[..., Engine],
) -> None:
    sleeper, busy = start("sleeper", [POOL, OTHER_POOL]), start("busy", [OTHER_POOL])
    busy.hold(num_used=8)
    shortage = sleeper.instance.beside.make_room(PAGE, patience_seconds=0.0)
    assert shortage is not None
    assert shortage.device == "other"
    assert sleeper.view(POOL).static_bytes == sleeper.view(OTHER_POOL).static_bytes == 0


def test_ranks_on_one_device_need_room_each(start: Callable[..., Engine]) -> None:
    sleeper = start("sleeper", [POOL, POOL])
    assert sleeper.instance.beside.make_room(4 * PAGE, 10.0) is None
    assert sleeper.view().static_bytes == 8 * PAGE
    shortage = sleeper.instance.beside.make_room(5 * PAGE, patience_seconds=0.0)
    assert shortage is not None
    assert shortage.missing_bytes == 2 * PAGE


def test_no_limit_keeps_weights_out_and_no_request_stops_for_them(
    start: Callable[..., Engine],
) -> None:
    sleeper = start("sleeper", KVCACHED_LIMIT="32MiB", KVCACHED_FLOOR="32MiB")
    neighbour = start("neighbour")
    neighbour.hold(num_cached=4, num_used=2)
    assert sleeper.instance.beside.make_room(6 * PAGE, 10.0) is None
    assert neighbour.view().resident_bytes == 2 * PAGE
    assert sleeper.instance.beside.make_room(8 * PAGE, patience_seconds=0.0) is not None
    assert neighbour.instance.wanted_pages() == (0, 0)


def test_who_waits_is_woken_when_an_announcement_shrinks(start: Callable[..., Engine]) -> None:
    sleeper, neighbour = start("sleeper"), start("neighbour")
    assert sleeper.instance.beside.make_room(8 * PAGE, 10.0) is None
    assert neighbour.instance.promise(2, is_urgent=True) == 0
    neighbour.asked.clear()
    sleeper.instance.beside.announce(4 * PAGE)
    assert neighbour.asked.wait(60)
    assert neighbour.instance.promise(2, is_urgent=True) == 2


def test_who_gave_up_does_not_wait_any_more_and_asks_again_at_once(
    start: Callable[..., Engine],
) -> None:
    asker, holder = start("asker"), start("holder")
    holder.hold(num_cached=8)
    holder.is_deaf = True
    assert asker.instance.promise(2, is_urgent=True) == 0
    assert asker.view().waiting_bytes == 2 * PAGE
    asker.instance.clear_waiting()
    assert asker.view().waiting_bytes == 0
    holder.is_deaf = False
    holder.answer()
    assert asker.instance.promise(2, is_urgent=True) == 2


def test_a_floor_set_from_outside_leaves_nobody_waiting(start: Callable[..., Engine]) -> None:
    idle, holder = start("idle"), start("holder")
    holder.hold(num_cached=8)
    directory = Path(idle.instance.seat(POOL).ledger_path).parent
    control.set_floor("idle", "32MiB", directory=directory)
    assert holder.view().resident_bytes == 6 * PAGE
    assert idle.view().waiting_bytes == 0
