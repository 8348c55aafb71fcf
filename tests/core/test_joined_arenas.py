"""Two arenas whose pages are numbered through: mapped together or not at all, told apart."""

from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from helpers.fake_driver import FakeDriver, Result, tensors_on_the_host

from kvcached_core.engine.page_book import PageBook
from kvcached_core.errors import BackendError, PageStateError, UnsupportedEngineError
from kvcached_core.memory import stacked_tensors
from kvcached_core.memory.geometry import Geometry
from kvcached_core.memory.joined_arenas import JoinedArenas
from kvcached_core.memory.mixed_arena import make_arena
from kvcached_core.memory.orders import PageOrders, PendingOrders
from kvcached_core.memory.size_classes import SizeClass, choose_any
from kvcached_core.memory.vmm.cuda import CudaBackend
from kvcached_core.memory.vmm.host import HostBackend
from kvcached_core.units import KIB, MIB

PAGE = 64 * KIB
FIRST, SECOND = Geometry(4096, 4, 16, 4), Geometry(1024, 2, 64, 32)
NUM_FIRST, NUM_SECOND = 3, 4


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    tensors_on_the_host(monkeypatch)
    return FakeDriver(capacity_bytes=16 * PAGE, granularity_bytes=PAGE)


@pytest.fixture
def joined(driver: FakeDriver) -> Iterator[JoinedArenas]:
    backend = CudaBackend(api=cast("Any", driver))
    made = JoinedArenas(
        make_arena(backend, FIRST, NUM_FIRST), make_arena(backend, SECOND, NUM_SECOND)
    )
    yield made
    driver.fails = lambda _name, _number: None
    made.close()
    assert driver.created_bytes == driver.mapped_bytes == 0


def test_a_page_is_in_one_arena_and_has_one_number(joined: JoinedArenas) -> None:
    first, second = joined.arenas
    joined.map([0, 2, 3, 6])
    assert (first.resident_pages, second.resident_pages) == ([0, 2], [0, 3])
    assert joined.resident_pages == [0, 2, 3, 6]
    assert [joined.is_resident(page) for page in range(7)] == [1, 0, 1, 1, 0, 0, 1]
    joined.unmap([6, 0])
    assert joined.resident_pages == [2, 3]
    with pytest.raises(PageStateError):
        joined.unmap([6])
    assert joined.maps is second.maps
    assert joined.maps.take().num_calls == 4


def test_pages_of_both_are_mapped_or_of_none(joined: JoinedArenas, driver: FakeDriver) -> None:
    joined.map([1])
    num_maps = 0

    def fails(name: str, _number: int) -> Any:
        nonlocal num_maps
        num_maps += name == "cuMemMap"
        return Result.CUDA_ERROR_UNKNOWN if name == "cuMemMap" and num_maps == 3 else None

    driver.fails = fails
    with pytest.raises(BackendError):
        joined.map([0, 3, 4])
    assert joined.resident_pages == [1]


@pytest.mark.parametrize("is_mapped", [True, False])
def test_pages_of_both_can_be_taken_back_whatever_fails(
    joined: JoinedArenas, driver: FakeDriver, *, is_mapped: bool
) -> None:
    joined.map([1])
    number, broken = driver.calls["cuMemCreate"] + 2, Result.CUDA_ERROR_UNKNOWN
    driver.fails = lambda name, count: (
        broken
        if name == "cuMemUnmap" or (not is_mapped and (name, count) == ("cuMemCreate", number))
        else None
    )
    if is_mapped:
        joined.map([0, 3, 4])
        joined.take_back([0, 3, 4])
    else:
        with pytest.raises(BackendError, match="cuMemCreate"):
            joined.map([0, 3, 4])
    assert joined.resident_pages == [1]
    driver.fails = lambda _name, _number: None
    joined.map([0, 3, 4])
    assert driver.created_bytes == driver.mapped_bytes == 4 * PAGE


def test_books_of_two_arenas_have_their_orders_in_common() -> None:
    orders = PendingOrders()
    first = PageBook(NUM_FIRST, orders=orders)
    second = PageBook(NUM_SECOND, orders=orders, first_page=NUM_FIRST)
    for book in (first, second):
        assert book.take_unmapped() == 1
        book.open(1, is_spare=False)
    taken = first.take_orders(lambda: (4, 0), is_live=False)
    assert taken == PageOrders(map_pages=[1, NUM_FIRST + 1], num_used_pages=4)
    second.open(2, is_spare=True)
    second.need(2)
    second.close(1)
    taken = second.take_orders(lambda: (4, 0), is_live=False)
    assert taken is not None
    assert (taken.map_pages, taken.unmap_pages) == ([NUM_FIRST + 2], [NUM_FIRST + 1])


CLASSES = (SizeClass(8192, 3), SizeClass(512, 6))


def make_stacks(num_blocks: int) -> list[torch.Tensor]:
    return [
        torch.zeros(size=(3, num_blocks, 32, 64), dtype=torch.float32),
        torch.zeros((3, num_blocks, 256), dtype=torch.int16),
        torch.zeros(3, num_blocks, 512, dtype=torch.int8),
        torch.zeros((3, num_blocks, 0), dtype=torch.float32),
        torch.zeros((num_blocks, 7), dtype=torch.float32),
    ]


def test_stacks_of_planes_are_dense_in_each_layer_and_each_block_is_its_own() -> None:
    geometry = choose_any(CLASSES, granularity_bytes=2 * MIB, target_page_bytes=4 * MIB)
    arena, made = make_arena(HostBackend(), geometry, 4), list[torch.Tensor]()
    num_ids = geometry.num_ids(4)
    stacked_tensors.lay_out(lambda: made.extend(make_stacks(num_ids)), geometry, arena)
    arena.map([0, 2])
    ids = [geometry.block_id(block) for block in (1, 2 * geometry.blocks_per_page)]
    layers = [layer for stack in made[:3] for layer in stack]
    assert all(layer.is_contiguous() for layer in layers)
    for number, layer in enumerate(layers):
        assert not layer[ids].any()
        layer[ids] = number + 1
    assert all(bool((layer[ids] == n + 1).all()) for n, layer in enumerate(layers))
    assert all(each.data_ptr() != arena.address for each in made[3:])
    made.clear()
    layers.clear()
    arena.close()


@pytest.mark.parametrize(
    ("num_made", "what"), [(1, "were made, expected"), (2, "blocks of 256 bytes was made")]
)
def test_other_planes_than_were_expected_are_refused(num_made: int, what: str) -> None:
    geometry = choose_any(CLASSES, granularity_bytes=2 * MIB, target_page_bytes=4 * MIB)
    arena = make_arena(HostBackend(), geometry, 4)

    def make() -> None:
        torch.zeros((3, geometry.num_ids(4), 8192), dtype=torch.int8)
        if num_made > 1:
            torch.zeros((3, geometry.num_ids(4), 256), dtype=torch.int8)

    with pytest.raises(UnsupportedEngineError, match=what):
        stacked_tensors.lay_out(make, geometry, arena)
    arena.close()
