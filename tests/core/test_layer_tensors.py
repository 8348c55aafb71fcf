"""Planes of a KV pool in an arena: K and V apart, or one behind the other, with dense rows."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvcached_core.errors import UnsupportedEngineError
from kvcached_core.memory import layer_tensors
from kvcached_core.memory.arena import Arena
from kvcached_core.memory.geometry import Geometry, choose_geometry
from kvcached_core.memory.mixed_arena import make_arena
from kvcached_core.memory.size_classes import SizeClass, choose_any
from kvcached_core.memory.vmm.host import HostBackend

ROWS = 1024


class Pool:
    """Makes buffers as an engine's pools do."""

    rows = ROWS
    made: list[torch.Tensor]

    def apart(self) -> None:
        self.made = [torch.zeros((self.rows, 2, 16), dtype=torch.float16) for _ in range(4)]

    def fused(self) -> None:
        both = [torch.zeros((2, self.rows, 2, 16), dtype=torch.float16) for _ in range(2)]
        self.made = [half for pair in both for half in (pair[0, : self.rows], pair[1])]
        self.other = torch.zeros(3, dtype=torch.float16)


@pytest.mark.parametrize("make", [Pool.apart, Pool.fused])
def test_each_plane_holds_what_is_written_to_it_alone(make: Callable[[Any], None]) -> None:
    pool, backend = Pool(), HostBackend()
    shape = layer_tensors.measure(lambda: make(pool), ROWS, 1)
    assert (shape.num_planes, shape.block_bytes, shape.num_blocks) == (4, 64, ROWS)
    geometry = choose_geometry(
        block_bytes=shape.block_bytes,
        num_planes=4,
        granularity_bytes=backend.granularity_bytes,
        target_page_bytes=64 * 1024,
    )
    arena = Arena(backend, geometry, -(-ROWS // geometry.blocks_per_page))
    arena.map(range(arena.num_pages))
    pool.rows = layer_tensors.num_rows(shape, geometry, arena.num_pages)
    layer_tensors.lay_out(lambda: make(pool), shape, geometry, arena)
    ids = torch.tensor([geometry.block_id(index) for index in range(ROWS)])
    for number, plane in enumerate(pool.made):
        assert plane.shape == (pool.rows, 2, 16)
        assert plane.is_contiguous()
        plane[ids] = float(number + 1)
    for number, plane in enumerate(pool.made):
        assert bool((plane[ids] == number + 1).all())
    start = arena.address
    assert [plane.data_ptr() - start for plane in pool.made] == [
        geometry.plane_offset(number) for number in range(4)
    ]
    pool.made.clear()
    arena.close()


BLOCK_TOKENS = 4


class MixedPool(Pool):
    """Keys and values of two sizes, and a row of scales for each token and for each block."""

    def fused(self) -> None:
        both = [torch.zeros((2, self.rows, 2, 16), dtype=torch.float16) for _ in range(2)]
        self.made = [half for pair in both for half in (pair[0], pair[1])]
        rows, blocks = self.rows, self.rows // BLOCK_TOKENS
        self.made += [torch.zeros((rows, 2, 8), dtype=torch.float16) for _ in range(3)]
        self.made += [torch.zeros((rows, 3), dtype=torch.uint8) for _ in range(2)]
        self.made += [torch.zeros((blocks, 2, 5), dtype=torch.uint8) for _ in range(2)]
        self.other = torch.zeros(blocks, dtype=torch.uint8)


def test_planes_of_several_sizes_have_the_same_ids_and_none_shares_a_byte() -> None:
    pool, backend = MixedPool(), HostBackend()
    shape = layer_tensors.measure(pool.fused, ROWS, BLOCK_TOKENS)
    assert (shape.num_planes, shape.block_bytes) == (4, 64 * BLOCK_TOKENS)
    assert shape.others == (SizeClass(128, 3), SizeClass(12, 2), SizeClass(10, 2))
    geometry = choose_any(
        (SizeClass(shape.block_bytes, shape.num_planes), *shape.others),
        granularity_bytes=backend.granularity_bytes,
        target_page_bytes=64 * 1024,
    )
    num_blocks = 2 * geometry.blocks_per_page
    arena = make_arena(backend, geometry, 2)
    arena.map(range(2))
    pool.rows = layer_tensors.num_rows(shape, geometry, 2)
    layer_tensors.lay_out(pool.fused, shape, geometry, arena)
    ids = torch.tensor([geometry.block_id(index) for index in range(0, num_blocks, 4099)])
    tokens = torch.cat([ids * BLOCK_TOKENS + token for token in range(BLOCK_TOKENS)])
    rows = [tokens if plane.shape[0] == pool.rows else ids for plane in pool.made]
    for number, (plane, row) in enumerate(zip(pool.made, rows, strict=True)):
        assert plane.shape[0] in (pool.rows, geometry.num_ids(2))
        assert plane.is_contiguous()
        plane[row] = torch.tensor(number + 1, dtype=plane.dtype)
    for number, (plane, row) in enumerate(zip(pool.made, rows, strict=True)):
        assert bool((plane[row] == number + 1).all())
    assert pool.other.shape == (geometry.num_ids(2),)
    pool.made.clear()
    arena.close()


def test_a_pool_of_other_planes_than_were_measured_is_refused() -> None:
    pool, backend = Pool(), HostBackend()
    shape = layer_tensors.measure(pool.apart, ROWS, 1)
    geometry = choose_any((SizeClass(64, 4),), granularity_bytes=backend.granularity_bytes)
    arena = Arena(backend, geometry, 1)
    pool.rows = layer_tensors.num_rows(shape, geometry, 1)

    def make_one() -> None:
        torch.zeros((pool.rows, 2, 16), dtype=torch.float16)

    with pytest.raises(UnsupportedEngineError, match=r"\{64: 1\} were .*, expected \{64: 4\}"):
        layer_tensors.lay_out(make_one, shape, geometry, arena)
    arena.close()


def test_a_pool_without_planes_is_refused() -> None:
    with pytest.raises(UnsupportedEngineError, match="no planes"):
        layer_tensors.measure(lambda: None, ROWS, 1)


def test_a_plane_is_as_long_as_the_ids_of_its_pages() -> None:
    shape = layer_tensors.PoolShape(num_planes=4, num_rows=100, row_bytes=16, block_tokens=2)
    geometry = Geometry(block_bytes=32, num_planes=4, ids_per_page=33, blocks_per_page=8)
    assert layer_tensors.num_rows(shape, geometry, 3) == (2 * 33 + 8) * 2
