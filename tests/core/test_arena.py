"""The arena: all or none, whatever fails."""

import pytest
import torch
from helpers.backends import CountingBackend, FaultyBackend
from helpers.process_memory import resident_bytes

from kvcached_core.errors import BackendError, GeometryError, OutOfMemoryError, PageStateError
from kvcached_core.memory.arena import Arena
from kvcached_core.memory.geometry import choose_geometry
from kvcached_core.memory.vmm.host import HostBackend
from kvcached_core.units import MIB

GEOMETRY = choose_geometry(
    block_bytes=65536, num_planes=8, granularity_bytes=2 * MIB, target_page_bytes=4 * MIB
)


def test_resident_bytes_are_what_the_kernel_says() -> None:
    arena = Arena(HostBackend(), GEOMETRY, 16)
    arena.map([0, 5, 9])
    assert arena.resident_bytes == 3 * GEOMETRY.page_bytes
    assert resident_bytes(arena.address, arena.num_bytes) == 3 * GEOMETRY.page_bytes
    arena.unmap([5])
    assert resident_bytes(arena.address, arena.num_bytes) == 2 * GEOMETRY.page_bytes
    arena.close()


def test_a_block_written_through_its_plane_lands_in_its_page() -> None:
    arena = Arena(HostBackend(), GEOMETRY, 4)
    arena.map([2])
    block_id = GEOMETRY.block_id(2 * GEOMETRY.blocks_per_page + 1)
    for plane in range(GEOMETRY.num_planes):
        blocks = arena.plane_tensor(plane).view(-1, GEOMETRY.block_bytes)
        assert blocks.shape[0] == GEOMETRY.num_ids(4)
        blocks[block_id].fill_(plane + 1)
    page = arena.tensor()[2 * GEOMETRY.page_bytes : 3 * GEOMETRY.page_bytes]
    written = {value: int((page == value).sum()) for value in range(1, GEOMETRY.num_planes + 1)}
    assert set(written.values()) == {GEOMETRY.block_bytes}
    arena.close()


def test_zeroing_touches_the_mapped_pages_and_no_other() -> None:
    arena = Arena(HostBackend(), GEOMETRY, 16)
    arena.map([3, 0])
    page_bytes = GEOMETRY.page_bytes
    pages = [arena.tensor()[page * page_bytes : (page + 1) * page_bytes] for page in (0, 3)]
    for page in pages:
        page.fill_(7)
    arena.zero()  # an access to an unmapped page would end the process
    assert not any(page.any() for page in pages)
    assert sorted(arena.resident_pages) == [0, 3]
    arena.close()


@pytest.mark.parametrize("verb", ["create", "map"])
@pytest.mark.parametrize("number", range(4))
def test_a_failure_at_any_step_of_mapping_leaves_nothing_behind(verb: str, number: int) -> None:
    counting = CountingBackend(HostBackend())
    faulty = FaultyBackend(counting, lambda called, count: (called, count) == (verb, 1 + number))
    arena = Arena(faulty, GEOMETRY, 8)
    arena.map([7])
    with pytest.raises(OutOfMemoryError):
        arena.map([0, 1, 2, 3])
    assert arena.resident_pages == [7]
    assert counting.created_bytes == GEOMETRY.page_bytes
    assert resident_bytes(arena.address, arena.num_bytes) == GEOMETRY.page_bytes
    arena.map([0, 1, 2, 3])
    assert len(arena.resident_pages) == 5
    arena.close()
    assert counting.created_bytes == 0


@pytest.mark.parametrize("undo", ["unmap", "release"])
@pytest.mark.parametrize("verb", ["create", "map", "zero"])
@pytest.mark.parametrize("is_mapped_again", [True, False])
def test_a_map_that_cannot_be_undone_is_over_all_the_same_and_can_be_tried_again(
    verb: str, undo: str, *, is_mapped_again: bool
) -> None:
    counting = CountingBackend(HostBackend())
    failing = 3 if verb != "zero" else 1
    faulty = FaultyBackend(
        counting, lambda called, number: called == undo or (called, number) == (verb, failing)
    )
    arena = Arena(faulty, GEOMETRY, 8)
    arena.map([7])
    with pytest.raises(OutOfMemoryError, match=verb):
        arena.map([0, 1, 2])
    assert arena.resident_pages == [7]
    faulty.fails = lambda _verb, _number: False
    if is_mapped_again:
        arena.map([2, 1, 0])
        assert sorted(arena.resident_pages) == [0, 1, 2, 7]
        assert arena.resident_bytes == counting.created_bytes == 4 * GEOMETRY.page_bytes
        assert resident_bytes(arena.address, arena.num_bytes) == arena.resident_bytes
        arena.zero()  # all of it can be reached
        arena.unmap([0])
        assert counting.created_bytes == 3 * GEOMETRY.page_bytes
    arena.close()
    assert counting.created_bytes == 0


def test_a_failure_of_unmapping_keeps_the_books_right() -> None:
    faulty = FaultyBackend(HostBackend(), lambda verb, number: (verb, number) == ("unmap", 1))
    arena = Arena(faulty, GEOMETRY, 8)
    arena.map([0, 1, 2])
    with pytest.raises(BackendError):
        arena.unmap([0, 1, 2])
    assert arena.resident_pages == [1, 2]
    assert resident_bytes(arena.address, arena.num_bytes) == arena.resident_bytes
    arena.close()


@pytest.mark.parametrize("page", [-1, 8, 3])
def test_a_wrong_page_is_refused_and_the_others_are_not_mapped(page: int) -> None:
    arena = Arena(HostBackend(), GEOMETRY, 8)
    arena.map([3])
    with pytest.raises(PageStateError):
        arena.map([1, page])
    assert arena.resident_pages == [3]
    with pytest.raises(PageStateError):
        arena.unmap([4])
    arena.close()


def test_close_gives_everything_back_once() -> None:
    arena = Arena(HostBackend(), GEOMETRY, 8)
    address = arena.address
    arena.map(range(8))
    arena.close()
    arena.close()
    assert resident_bytes(address, 8 * GEOMETRY.page_bytes) == 0


def test_a_pool_with_ids_over_31_bits_is_refused() -> None:
    with pytest.raises(GeometryError):
        Arena(HostBackend(), GEOMETRY, 2**27)


def test_strided_views_over_the_arena_address_the_same_bytes_as_its_planes() -> None:
    arena = Arena(HostBackend(), GEOMETRY, 4)
    arena.map([0, 1])
    ids = GEOMETRY.num_ids(4)
    view = torch.as_strided(
        arena.tensor(),
        (GEOMETRY.num_planes, ids, GEOMETRY.block_bytes),
        (GEOMETRY.run_bytes, GEOMETRY.block_bytes, 1),
    )
    for plane in range(GEOMETRY.num_planes):
        assert view[plane].data_ptr() == arena.plane_tensor(plane).data_ptr()
    arena.close()


def test_an_arena_whose_pages_are_written_whole_is_not_zeroed() -> None:
    for is_zeroed in (True, False):
        faulty = FaultyBackend(HostBackend(), lambda _verb, _number: False)
        arena = Arena(faulty, GEOMETRY, 8, is_zeroed=is_zeroed)
        arena.map([0, 1, 5])
        assert faulty.num_calls.get("zero", 0) == (2 if is_zeroed else 0)
        arena.close()
