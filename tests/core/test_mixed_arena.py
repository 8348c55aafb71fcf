"""Pages with a handle in each of several size classes: mapped in all or in none, whatever fails."""

import threading
from collections.abc import Iterator
from typing import Any, cast

import pytest
from helpers.backends import CountingBackend, FaultyBackend
from helpers.fake_driver import FakeDriver, Result, tensors_on_the_host
from helpers.process_memory import resident_bytes

from kvcached_core.errors import BackendError, OutOfMemoryError
from kvcached_core.memory.arena import Arena
from kvcached_core.memory.keeper import PageChanges, PageKeeper
from kvcached_core.memory.mixed_arena import MixedArena, make_arena
from kvcached_core.memory.size_classes import MixedGeometry, SizeClass, choose_any
from kvcached_core.memory.vmm.cuda import CudaBackend
from kvcached_core.memory.vmm.host import HostBackend, HostFence
from kvcached_core.units import KIB

NUM_PAGES = 8
# Three classes; the last one does not fill its handles, and none of them its addresses.
CLASSES = (SizeClass(4096, 8), SizeClass(2048, 4), SizeClass(528, 4))
GRANULARITY = 16 * KIB


def geometry_of() -> MixedGeometry:
    chosen = choose_any(CLASSES, granularity_bytes=GRANULARITY, target_page_bytes=128 * KIB)
    assert isinstance(chosen, MixedGeometry)
    return chosen


GEOMETRY = geometry_of()
PAGE = GEOMETRY.page_bytes


def arena_on(backend: Any, num_pages: int = NUM_PAGES) -> MixedArena:
    arena = make_arena(backend, GEOMETRY, num_pages)
    assert isinstance(arena, MixedArena)
    return arena


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    tensors_on_the_host(monkeypatch)
    return FakeDriver(capacity_bytes=NUM_PAGES * PAGE, granularity_bytes=GRANULARITY)


@pytest.fixture
def on_driver(driver: FakeDriver) -> Iterator[MixedArena]:
    made = arena_on(CudaBackend(api=cast("Any", driver)))
    yield made
    driver.fails = lambda _name, _number: None
    made.close()
    assert driver.created_bytes == driver.mapped_bytes == 0


def write(arena: Arena, block_id: int, value: int) -> None:
    """Write a block in every plane of every class, each with a value of its own."""
    number = 0
    for size_class, each in enumerate(arena.geometry.classes):
        for plane in range(each.num_planes):
            tensor = arena.plane_tensor(plane, size_class)
            start = block_id * each.block_bytes
            assert not tensor[start : start + each.block_bytes].any()
            tensor[start : start + each.block_bytes] = value + number
            number += 1


def is_written(arena: Arena, block_id: int, value: int) -> bool:
    number, same = 0, []
    for size_class, each in enumerate(arena.geometry.classes):
        for plane in range(each.num_planes):
            tensor = arena.plane_tensor(plane, size_class)
            start = block_id * each.block_bytes
            same.append(bool((tensor[start : start + each.block_bytes] == value + number).all()))
            number += 1
    return all(same)


def test_resident_bytes_are_what_the_kernel_says() -> None:
    arena = arena_on(HostBackend(GRANULARITY))
    arena.map([0, 5, 7])
    assert arena.resident_bytes == 3 * PAGE
    assert resident_bytes(arena.address, arena.num_bytes) == 3 * PAGE
    arena.unmap([5])
    assert resident_bytes(arena.address, arena.num_bytes) == 2 * PAGE
    arena.close()
    assert not arena.resident_pages


def test_every_block_is_its_own_in_every_plane_of_every_class() -> None:
    arena = arena_on(HostBackend(GRANULARITY))
    arena.map([2, 7])
    per_page = GEOMETRY.blocks_per_page
    ids = [GEOMETRY.block_id(block) for block in (2 * per_page, 8 * per_page - 1, 3 * per_page - 1)]
    for number, block_id in enumerate(ids):
        write(arena, block_id, 1 + 20 * number)
    assert all(is_written(arena, block_id, 1 + 20 * n) for n, block_id in enumerate(ids))
    arena.zero()  # an access to what is not mapped would end the process
    assert all(is_zero(arena, block_id) for block_id in ids)
    arena.close()


def is_zero(arena: Arena, block_id: int) -> bool:
    return not any(
        arena.plane_tensor(plane, size_class)[
            block_id * each.block_bytes : (block_id + 1) * each.block_bytes
        ].any()
        for size_class, each in enumerate(arena.geometry.classes)
        for plane in range(each.num_planes)
    )


def test_new_pages_hold_zeros_in_all_classes(driver: FakeDriver, on_driver: MixedArena) -> None:
    on_driver.map([3, 4])
    for page in (3, 4):
        write(on_driver, page * GEOMETRY.ids_per_page, 1)  # it asserts that they are zeros
    assert driver.calls["cuMemCreate"] == 2 * len(CLASSES)


CALLS = ["cuMemCreate", "cuMemMap", "cuMemSetAccess", "cuMemsetD8Async"]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("number", range(2 * len(CLASSES)))
def test_a_failure_of_any_call_that_maps_leaves_nothing_behind(
    driver: FakeDriver, on_driver: MixedArena, call: str, number: int
) -> None:
    on_driver.map([7])
    write(on_driver, 7 * GEOMETRY.ids_per_page, 1)
    failing = driver.calls[call] + number
    oom = Result.CUDA_ERROR_OUT_OF_MEMORY
    driver.fails = lambda name, count: oom if (name, count) == (call, failing) else None
    with pytest.raises(OutOfMemoryError):
        on_driver.map([0, 1])
    assert on_driver.resident_pages == [7]
    assert driver.created_bytes == driver.mapped_bytes == PAGE
    on_driver.map([0, 1])
    assert sorted(on_driver.resident_pages) == [0, 1, 7]
    assert driver.created_bytes == driver.mapped_bytes == 3 * PAGE
    assert is_written(on_driver, 7 * GEOMETRY.ids_per_page, 1)


@pytest.mark.parametrize("number", range(len(CLASSES)))
def test_a_page_that_cannot_be_unmapped_stays_mapped_in_all_classes(
    driver: FakeDriver, on_driver: MixedArena, number: int
) -> None:
    on_driver.map([0, 1])
    failing = driver.calls["cuMemUnmap"] + number
    broken = Result.CUDA_ERROR_UNKNOWN
    driver.fails = lambda name, count: broken if (name, count) == ("cuMemUnmap", failing) else None
    with pytest.raises(BackendError):
        on_driver.unmap([1, 0])
    assert on_driver.resident_pages == [0, 1]
    assert driver.mapped_bytes == driver.created_bytes == 2 * PAGE
    on_driver.zero()  # all of it can be reached
    on_driver.unmap([1])
    assert driver.mapped_bytes == driver.created_bytes == PAGE


@pytest.mark.parametrize("number", range(len(CLASSES)))
def test_handles_that_cannot_be_released_are_used_again(
    driver: FakeDriver, on_driver: MixedArena, number: int
) -> None:
    on_driver.map([0, 1])
    failing = driver.calls["cuMemRelease"] + number
    broken = Result.CUDA_ERROR_UNKNOWN
    driver.fails = lambda name, count: (
        broken if (name, count) == ("cuMemRelease", failing) else None
    )
    with pytest.raises(BackendError):
        on_driver.unmap([1])
    assert on_driver.resident_pages == [0]
    assert driver.mapped_bytes == PAGE
    assert driver.created_bytes == PAGE + GEOMETRY.handle_bytes[number]
    on_driver.map([1])
    assert driver.created_bytes == 2 * PAGE


@pytest.mark.parametrize("number", range(1, len(CLASSES)))
def test_a_map_that_cannot_be_undone_leaves_a_page_that_is_not_there_and_can_be_mapped_later(
    driver: FakeDriver, on_driver: MixedArena, number: int
) -> None:
    failing = driver.calls["cuMemMap"] + number
    oom = Result.CUDA_ERROR_OUT_OF_MEMORY
    driver.fails = lambda name, count: (
        oom if name == "cuMemUnmap" or (name, count) == ("cuMemMap", failing) else None
    )
    with pytest.raises(OutOfMemoryError):
        on_driver.map([3])
    assert not on_driver.is_resident(3)
    left = sum(GEOMETRY.handle_bytes[:number])
    assert driver.mapped_bytes == driver.created_bytes == left
    driver.fails = lambda _name, _number: None
    on_driver.map([3])
    assert driver.mapped_bytes == driver.created_bytes == PAGE
    write(on_driver, 3 * GEOMETRY.ids_per_page, 1)


def test_who_finds_no_memory_hears_of_that_although_nothing_can_be_released(
    driver: FakeDriver, on_driver: MixedArena
) -> None:
    oom = Result.CUDA_ERROR_OUT_OF_MEMORY
    driver.fails = lambda name, count: (
        oom if name == "cuMemRelease" or (name, count) == ("cuMemCreate", 1) else None
    )
    with pytest.raises(OutOfMemoryError, match="cuMemCreate"):
        on_driver.map([3])
    driver.fails = lambda _name, _number: None
    on_driver.map([3])
    assert driver.mapped_bytes == driver.created_bytes == PAGE


@pytest.mark.parametrize("again", [True, False])
def test_an_unmap_that_cannot_be_undone_takes_the_page_away_as_far_as_it_goes(
    driver: FakeDriver, on_driver: MixedArena, *, again: bool
) -> None:
    on_driver.map([0, 3])
    failing = driver.calls["cuMemUnmap"] + 1
    oom = Result.CUDA_ERROR_OUT_OF_MEMORY
    driver.fails = lambda name, count: (
        oom if name == "cuMemMap" or (name, count) == ("cuMemUnmap", failing) else None
    )
    with pytest.raises(BackendError):
        on_driver.unmap([3])
    assert on_driver.resident_pages == [0]
    left = sum(GEOMETRY.handle_bytes[1:])
    assert driver.mapped_bytes == driver.created_bytes == PAGE + left
    driver.fails = lambda _name, _number: None
    if again:  # otherwise what is left goes with the arena
        on_driver.map([3])
        assert driver.mapped_bytes == driver.created_bytes == 2 * PAGE
        write(on_driver, 3 * GEOMETRY.ids_per_page, 1)


def test_a_keeper_counts_a_page_once_and_brings_back_one_that_is_stuck() -> None:
    counting = CountingBackend(HostBackend(GRANULARITY))
    faulty = FaultyBackend(counting, lambda verb, number: (verb, number) == ("unmap", 1))
    arena = arena_on(faulty)
    changes: list[PageChanges] = []
    keeper = PageKeeper(arena, changes.append)
    keeper.map_now([0, 1])
    keeper.unmap_behind([1], HostFence())
    keeper.wait()
    assert changes == [PageChanges(num_mapped=2), PageChanges(num_stuck=1)]
    keeper.map_now([1])
    assert changes[2:] == [PageChanges(num_spared=1)]
    keeper.unmap_behind([1], HostFence())
    keeper.wait()
    assert changes[3:] == [PageChanges(num_unmapped=1)]
    assert counting.created_bytes == PAGE
    keeper.close()
    arena.close()
    assert counting.created_bytes == 0


def test_threads_map_and_unmap_different_pages_at_once(
    driver: FakeDriver, on_driver: MixedArena
) -> None:
    barrier, errors = threading.Barrier(3), []

    def work(page: int) -> None:
        try:
            barrier.wait()
            for _ in range(30):
                on_driver.map([page])
                on_driver.unmap([page])
        except BaseException as error:  # noqa: BLE001  the test's thread says it
            errors.append(error)

    threads = [threading.Thread(target=work, args=(page,)) for page in (0, 4, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert not on_driver.resident_pages
    assert driver.created_bytes == 0


def test_one_class_keeps_the_arena_that_it_had() -> None:
    alone = choose_any(CLASSES[:1], granularity_bytes=GRANULARITY)
    arena = make_arena(HostBackend(GRANULARITY), alone, 2)
    assert type(arena) is Arena
    arena.close()
