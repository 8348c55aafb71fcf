"""Planes of a KV pool in an arena: K and V apart, or one behind the other, with dense rows."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvcached_core.errors import UnsupportedEngineError
from kvcached_core.memory import layer_tensors
from kvcached_core.memory.arena import Arena
from kvcached_core.memory.geometry import Geometry, choose_geometry
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


def test_layers_of_different_sizes_are_refused() -> None:
    def make() -> None:
        torch.zeros((ROWS, 2, 16), dtype=torch.float16)
        torch.zeros((ROWS, 2, 8), dtype=torch.float16)

    with pytest.raises(UnsupportedEngineError, match=r"\[32, 64\]"):
        layer_tensors.measure(make, ROWS, 1)


def test_a_plane_is_as_long_as_the_ids_of_its_pages() -> None:
    shape = layer_tensors.PoolShape(num_planes=4, num_rows=100, row_bytes=16, block_tokens=2)
    geometry = Geometry(block_bytes=32, num_planes=4, ids_per_page=33, blocks_per_page=8)
    assert layer_tensors.num_rows(shape, geometry, 3) == (2 * 33 + 8) * 2
