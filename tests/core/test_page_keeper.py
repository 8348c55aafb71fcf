"""The page keeper: what a step needs is there when it returns, the rest happens behind its back."""

import threading
from collections.abc import Iterator

import pytest

from kvcached_core.arena import Arena
from kvcached_core.errors import OutOfMemoryError
from kvcached_core.geometry import choose_geometry
from kvcached_core.page_keeper import PageChanges, PageKeeper
from kvcached_core.units import MIB
from kvcached_core.vmm.faulty import FaultyBackend
from kvcached_core.vmm.host import HostBackend
from kvcached_core.vmm.metered import MeteredBackend

GEOMETRY = choose_geometry(
    block_bytes=65536, num_planes=8, granularity_bytes=2 * MIB, target_page_bytes=2 * MIB
)
NUM_PAGES = 32


class HeldFence:
    """A fence that is passed when the test says so."""

    def __init__(self) -> None:
        self.passed = threading.Event()
        self.reached = threading.Event()

    def wait(self) -> None:
        self.reached.set()
        assert self.passed.wait(30)


class Setup:
    """A keeper over host memory, with its reports added up."""

    def __init__(self) -> None:
        self.backend = MeteredBackend(FaultyBackend(HostBackend(), lambda *_: False))
        self.arena = Arena(self.backend, GEOMETRY, NUM_PAGES)
        self.mapped = self.unmapped = self.spared = 0
        self.threads: set[str] = set()
        self._lock = threading.Lock()
        self.keeper = PageKeeper(self.arena, self.report)

    def report(self, changes: PageChanges) -> None:
        with self._lock:
            self.threads.add(threading.current_thread().name)
            self.mapped += changes.num_mapped
            self.unmapped += changes.num_unmapped
            self.spared += changes.num_spared


@pytest.fixture
def setup() -> Iterator[Setup]:
    made = Setup()
    yield made
    made.keeper.close()
    assert made.mapped - made.unmapped == len(made.arena.resident_pages)
    made.arena.close()


def passed() -> HeldFence:
    fence = HeldFence()
    fence.passed.set()
    return fence


def test_what_is_needed_now_is_mapped_on_return_by_the_caller(setup: Setup) -> None:
    setup.keeper.map_now([0, 5])
    assert setup.arena.resident_pages == [0, 5]
    assert setup.threads == {threading.current_thread().name}


def test_spare_pages_and_pages_given_back_are_no_work_of_the_caller(setup: Setup) -> None:
    setup.keeper.map_soon(range(10))
    setup.keeper.wait()
    setup.keeper.map_now(range(10))
    setup.keeper.unmap_behind(range(10), passed())
    setup.keeper.wait()
    assert (setup.mapped, setup.unmapped, setup.spared) == (10, 10, 0)
    assert setup.threads == {"kvcached-map", "kvcached-unmap"}
    mine = setup.backend.statistics.num_calls_of_thread(threading.get_ident())
    assert mine == 1  # the reservation of the arena


def test_a_page_stays_mapped_until_its_fence_is_passed(setup: Setup) -> None:
    setup.keeper.map_now([1, 2])
    fence = HeldFence()
    setup.keeper.unmap_behind([1], fence)
    assert fence.reached.wait(30)
    setup.keeper.map_now([3])
    assert setup.arena.resident_pages == [1, 2, 3]
    fence.passed.set()
    setup.keeper.wait()
    assert setup.arena.resident_pages == [2, 3]


def test_a_page_needed_again_before_its_fence_is_passed_stays(setup: Setup) -> None:
    setup.keeper.map_now([1, 2, 3])
    fence = HeldFence()
    setup.keeper.unmap_behind([1, 2, 3], fence)
    assert fence.reached.wait(30)
    setup.keeper.map_now([1])
    setup.keeper.map_soon([2])
    fence.passed.set()
    setup.keeper.wait()
    assert sorted(setup.arena.resident_pages) == [1, 2]
    assert (setup.mapped, setup.unmapped, setup.spared) == (3, 1, 2)


def test_waiting_for_a_fence_does_not_hold_up_mapping(setup: Setup) -> None:
    setup.keeper.map_now([1])
    fence = HeldFence()
    setup.keeper.unmap_behind([1], fence)
    assert fence.reached.wait(30)
    setup.keeper.map_soon([7])
    setup.keeper.map_now([7])
    assert setup.arena.is_resident(7)
    fence.passed.set()


def test_an_order_to_map_that_is_taken_back_is_reported(setup: Setup) -> None:
    first = HeldFence()
    setup.keeper.map_now([1])
    setup.keeper.unmap_behind([1], first)
    assert first.reached.wait(30)
    setup.keeper.unmap_behind([9], passed())  # ordered as spare before, never begun
    first.passed.set()
    setup.keeper.wait()
    assert (setup.mapped, setup.unmapped, setup.spared) == (1, 1, 1)


def test_a_spare_page_that_cannot_be_mapped_is_mapped_when_it_is_needed(setup: Setup) -> None:
    faulty = setup.backend.inner
    assert isinstance(faulty, FaultyBackend)
    faulty.fails = lambda verb, _number: verb == "create"
    setup.keeper.map_soon([4])
    setup.keeper.wait()
    assert not setup.arena.is_resident(4)
    with pytest.raises(OutOfMemoryError):
        setup.keeper.map_now([4])
    faulty.fails = lambda *_: False
    setup.keeper.map_now([4])
    assert setup.arena.is_resident(4)


@pytest.mark.parametrize(("verb", "num_left"), [("unmap", 1), ("release", 0)])
def test_a_failing_unmap_does_not_stop_the_next_ones(
    setup: Setup, verb: str, num_left: int
) -> None:
    faulty = setup.backend.inner
    assert isinstance(faulty, FaultyBackend)
    setup.keeper.map_now(range(8))
    faulty.fails = lambda called, number: (called, number) == (verb, 0)
    setup.keeper.unmap_behind(range(8), passed())
    setup.keeper.wait()
    assert len(setup.arena.resident_pages) == num_left
    assert setup.unmapped == 8 - num_left


def test_threads_that_order_at_random_leave_what_was_ordered_last(setup: Setup) -> None:
    import random

    rng = random.Random(0)
    wanted: dict[int, bool] = {}
    for _ in range(400):
        pages = rng.sample(range(NUM_PAGES), 4)
        up = rng.random() < 0.5
        if up and rng.random() < 0.5:
            setup.keeper.map_now(pages)
            assert all(setup.arena.is_resident(page) for page in pages)
        elif up:
            setup.keeper.map_soon(pages)
        else:
            setup.keeper.unmap_behind(pages, passed())
        wanted.update(dict.fromkeys(pages, up))
    setup.keeper.wait()
    assert sorted(setup.arena.resident_pages) == sorted(page for page, up in wanted.items() if up)
