"""One rank's memory: what it leaves behind, what it tells the ledger, and how long it waits."""

import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from helpers import fake_driver
from helpers.backends import FaultyBackend, Result

from kvcached_core.config import HOST, read_config
from kvcached_core.engine.instance import Instance
from kvcached_core.errors import BackendError, OutOfMemoryError, PageKeeperError
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.view import InstanceView
from kvcached_core.memory import patience, rank
from kvcached_core.memory.devices import Device
from kvcached_core.memory.geometry import choose_geometry
from kvcached_core.memory.orders import PageOrders
from kvcached_core.memory.patience import LOG_SECONDS
from kvcached_core.memory.rank import PATIENCE_SECONDS, RankMemory
from kvcached_core.memory.seats import Seat
from kvcached_core.memory.vmm.backend import Fence
from kvcached_core.memory.vmm.cuda import CudaBackend
from kvcached_core.memory.vmm.host import HostBackend, HostFence
from kvcached_core.units import MIB

GEOMETRY = choose_geometry(
    block_bytes=65536, num_planes=4, granularity_bytes=2 * MIB, target_page_bytes=2 * MIB
)
PAGE = GEOMETRY.page_bytes
NUM_PAGES = 16
POOL = Device(HOST, "host", 64 * PAGE)


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[Instance]:
    config = read_config({"KVCACHED_DIR": str(tmp_path / "kv")})
    made = Instance([POOL], config, name="a", default_name="", engine="test", on_ring=lambda: None)
    made.describe(page_bytes=PAGE, num_pages=NUM_PAGES)
    made.promise(1, is_urgent=False)
    yield made
    made.close()


@pytest.fixture
def seat(instance: Instance) -> Seat:
    return instance.seat(POOL)


def seen(seat: Seat) -> InstanceView:
    with Ledger(Path(seat.ledger_path)) as ledger:
        (view,) = ledger.view().instances
        return view


def never(_verb: str, _number: int) -> bool:
    return False


def faulty() -> FaultyBackend:
    return FaultyBackend(HostBackend(), never)


def our_threads() -> set[str]:
    names = {thread.name for thread in threading.enumerate()}
    return {name for name in names if name in ("kvcached-map", "kvcached-unmap")}


class CountingReservations(FaultyBackend):
    """Knows how many ranges are reserved."""

    num_reserved = 0

    def reserve(self, num_bytes: int) -> int:
        address = super().reserve(num_bytes)
        self.num_reserved += 1
        return address

    def free(self, address: int, num_bytes: int) -> None:
        super().free(address, num_bytes)
        self.num_reserved -= 1


class Refusing(CountingReservations):
    """Fails one verb as a device does that is not short of memory."""

    def __init__(self, verb: str) -> None:
        super().__init__(HostBackend(), never)
        self._verb = verb

    def _call(
        self, verb: str, num_bytes: int, function: Callable[..., Result], *args: object
    ) -> Result:
        if verb == self._verb:
            raise BackendError(verb, "CUDA_ERROR_UNKNOWN", num_bytes)
        return function(*args)


@pytest.mark.parametrize("verb", ["reserve", "create", "map", "join"])
def test_a_memory_that_cannot_have_its_first_page_leaves_nothing_behind(
    seat: Seat, verb: str
) -> None:
    backend = Refusing(verb)
    num_open = len(os.listdir("/proc/self/fd"))  # noqa: PTH208  names are enough
    with pytest.raises(BackendError, match="CUDA_ERROR_UNKNOWN"):
        RankMemory(GEOMETRY, NUM_PAGES, seat, backend)
    assert backend.num_reserved == 0
    assert our_threads() == set()
    assert len(os.listdir("/proc/self/fd")) == num_open  # noqa: PTH208
    assert seen(seat).resident_bytes == 0
    RankMemory(GEOMETRY, NUM_PAGES, seat, HostBackend()).close()


class VirtualTime:
    """A clock that runs while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0
        self.sleeps: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now += seconds
        assert self.now < 1000, "it waits for ever"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> VirtualTime:
    made = VirtualTime()
    clock = SimpleNamespace(monotonic=made.monotonic, sleep=made.sleep)
    for module in (patience, rank):
        monkeypatch.setattr(module, "time", clock)
    return made


def test_a_step_that_finds_no_memory_waits_longer_and_longer_says_so_now_and_then_and_ends(
    instance: Instance, seat: Seat, clock: VirtualTime, caplog: pytest.LogCaptureFixture
) -> None:
    backend = faulty()
    memory = RankMemory(GEOMETRY, NUM_PAGES, seat, backend)
    instance.promise(2, is_urgent=False)
    backend.fails = lambda verb, _number: verb == "create"
    with pytest.raises(OutOfMemoryError), caplog.at_level(logging.WARNING, "kvcached"):
        memory.before_step(PageOrders(map_pages=[1, 2], num_used_pages=3))
    assert PATIENCE_SECONDS < sum(clock.sleeps) < PATIENCE_SECONDS + 1
    assert clock.sleeps == sorted(clock.sleeps)
    assert clock.sleeps[0] < 0.02
    assert len(clock.sleeps) < 250
    *warnings, last = caplog.records
    assert len(warnings) <= PATIENCE_SECONDS / LOG_SECONDS + 1
    assert {record.levelname for record in warnings} == {"WARNING"}
    assert last.levelname == "ERROR"
    assert "2 pages were promised and found no memory in 30 s, so this engine ends" in last.message
    assert sorted(memory.arena.resident_pages) == [0]
    backend.fails = never
    memory.close()


def test_a_step_goes_on_when_memory_comes(
    instance: Instance, seat: Seat, clock: VirtualTime
) -> None:
    backend = faulty()
    memory = RankMemory(GEOMETRY, NUM_PAGES, seat, backend)
    instance.promise(1, is_urgent=False)
    start = clock.now
    backend.fails = lambda verb, _number: verb == "create" and clock.now < start + 1
    memory.before_step(PageOrders(map_pages=[1], num_used_pages=2))
    assert memory.arena.is_resident(1)
    assert start + 1 <= clock.now < start + 1.2
    memory.close()


def test_nobody_waits_for_a_page_that_cannot_be_unmapped(instance: Instance, seat: Seat) -> None:
    backend = faulty()
    memory = RankMemory(GEOMETRY, NUM_PAGES, seat, backend)
    instance.promise(3, is_urgent=False)
    memory.carry_out(PageOrders(map_pages=[1, 2, 3], num_used_pages=4))
    backend.fails = lambda verb, _number: verb == "unmap"
    instance.acknowledge(3)
    instance.promise(2, is_urgent=False)  # for other pages
    assert seen(seat).coming_bytes == 3 * PAGE
    memory.carry_out(PageOrders(unmap_pages=[1, 2, 3], num_used_pages=1))
    view = seen(seat)
    assert (view.coming_bytes, view.resident_bytes, view.idle_bytes) == (0, 4 * PAGE, 3 * PAGE)
    assert view.promised_bytes == 2 * PAGE
    backend.fails = never
    instance.promise(1, is_urgent=False)
    memory.carry_out(PageOrders(map_pages=[2], num_used_pages=2))
    view = seen(seat)
    assert (view.promised_bytes, view.resident_bytes) == (2 * PAGE, 4 * PAGE)
    memory.close()
    assert seen(seat).resident_bytes == 0


class BrokenFences(HostBackend):
    """A device whose work ends in an error."""

    is_broken = False

    def fence(self, stream: int) -> Fence:  # type: ignore[override]
        if not self.is_broken:
            return super().fence(stream)

        def fail() -> None:
            raise BackendError("cuEventSynchronize", "CUDA_ERROR_ILLEGAL_ADDRESS", 0)

        return SimpleNamespace(wait=fail)


@pytest.mark.parametrize(
    "orders",
    [
        PageOrders(num_used_pages=3),
        PageOrders(map_pages=[5], num_used_pages=3),
        PageOrders(spare_pages=[5]),
        PageOrders(unmap_pages=[2]),
    ],
)
def test_after_a_failed_fence_nothing_is_unmapped_and_the_next_step_says_why(
    instance: Instance, seat: Seat, orders: PageOrders
) -> None:
    backend = BrokenFences()
    memory = RankMemory(GEOMETRY, NUM_PAGES, seat, backend)
    instance.promise(2, is_urgent=False)
    memory.carry_out(PageOrders(map_pages=[1, 2], num_used_pages=3))
    backend.is_broken = True
    memory.after_step(PageOrders(unmap_pages=[1]))
    with pytest.raises(PageKeeperError):
        memory.keeper.wait()
    assert sorted(memory.arena.resident_pages) == [0, 1, 2]
    with pytest.raises(PageKeeperError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        memory.apply(orders)
    memory.close()
    assert our_threads() == set()
    assert seen(seat).resident_bytes == 0


@pytest.mark.parametrize("call", ["cuEventCreate", "cuEventRecord"])
def test_pages_go_behind_their_step_where_the_driver_refuses_an_event(
    instance: Instance, seat: Seat, call: str
) -> None:
    driver = fake_driver.FakeDriver()
    memory = RankMemory(GEOMETRY, NUM_PAGES, seat, CudaBackend(api=cast("Any", driver)))
    instance.promise(2, is_urgent=False)
    memory.carry_out(PageOrders(map_pages=[1, 2], num_used_pages=3))
    instance.acknowledge(2)
    refused = fake_driver.Result.CUDA_ERROR_OUT_OF_MEMORY
    driver.fails = lambda name, _: refused if name == call else None
    memory.carry_out(PageOrders(unmap_pages=[1, 2], num_used_pages=1))
    view = seen(seat)
    assert (view.coming_bytes, view.resident_bytes) == (0, PAGE)
    driver.fails = lambda *_: None
    memory.close()
    assert driver.created_bytes == 0


def test_what_else_fails_while_it_closes_the_ledger_is_let_go_of(seat: Seat) -> None:
    backend = faulty()
    memory = RankMemory(GEOMETRY, NUM_PAGES, seat, backend)
    num_open = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    backend.fails = lambda verb, _number: verb == "unmap"
    with pytest.raises(BackendError):
        memory.close()
    assert len(os.listdir("/proc/self/fd")) < num_open  # noqa: PTH208


class Streams(HostBackend):
    """Remembers which streams it was to wait for, or to let wait."""

    def __init__(self) -> None:
        super().__init__()
        self.joined: list[int] = []
        self.fenced: list[int] = []

    def join(self, stream: int) -> None:
        self.joined.append(stream)

    def fence(self, stream: int) -> HostFence:
        self.fenced.append(stream)
        return super().fence(stream)


def test_pages_come_and_go_with_the_stream_of_the_steps(instance: Instance, seat: Seat) -> None:
    backend, stream = Streams(), 7
    memory = RankMemory(GEOMETRY, NUM_PAGES, seat, backend, lambda: stream)
    assert backend.joined == [7]
    instance.promise(1, is_urgent=False)
    stream = 9
    memory.carry_out(PageOrders(map_pages=[1], num_used_pages=2))
    memory.carry_out(PageOrders(unmap_pages=[1], num_used_pages=1))
    assert (backend.joined, backend.fenced) == ([7, 9], [9])
    memory.close()


def test_a_spare_page_that_a_step_needs_is_there_before_it(instance: Instance, seat: Seat) -> None:
    backend = faulty()
    memory = RankMemory(GEOMETRY, NUM_PAGES, seat, backend)
    instance.promise(2, is_urgent=False)
    backend.fails = lambda verb, _number: verb == "create"
    memory.carry_out(PageOrders(spare_pages=[1, 2], num_used_pages=1))  # there is no memory yet
    backend.fails = never
    memory.before_step(PageOrders(ready_pages=[1], num_used_pages=2))
    assert memory.arena.is_resident(1)
    memory.close()


def test_pages_of_ranks_on_one_device_are_counted_for_each(tmp_path: Path) -> None:
    config = read_config({"KVCACHED_DIR": str(tmp_path / "kv")})
    instance = Instance(
        [POOL, POOL], config, name="a", default_name="", engine="test", on_ring=lambda: None
    )
    instance.describe(page_bytes=PAGE, num_pages=NUM_PAGES)
    instance.promise(3, is_urgent=False)
    seat = instance.seat(POOL)
    ranks = [RankMemory(GEOMETRY, NUM_PAGES, seat, HostBackend()) for _ in range(2)]
    for memory in ranks:
        memory.carry_out(PageOrders(map_pages=[1, 2], num_used_pages=2, num_cached_pages=1))
    view = seen(seat)
    sizes = view.resident_bytes, view.used_bytes, view.cached_bytes, view.promised_bytes
    assert sizes == (6 * PAGE, 4 * PAGE, 2 * PAGE, 0)
    for memory in ranks:
        memory.close()
    assert seen(seat).resident_bytes == 0
    instance.close()
