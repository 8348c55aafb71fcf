"""Planes of a KV pool in an arena: K and V apart, or one behind the other, with dense rows."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from sglang.srt.mem_cache import memory_pool
from sglang.srt.mem_cache.memory_pool import (
    HybridLinearKVPool,
    KVCache,
    MHATokenToKVPool,
    MHATokenToKVPoolFP4,
    MLATokenToKVPool,
)
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

from kvcached_core.errors import UnsupportedEngineError
from kvcached_core.memory import layer_tensors
from kvcached_core.memory.arena import Arena
from kvcached_core.memory.geometry import Geometry, choose_geometry
from kvcached_core.memory.vmm.host import HostBackend
from kvcached_sglang import engine as engines
from kvcached_sglang import hooks, pools

pytestmark = pytest.mark.sglang

ROWS = 1024


class Pool:
    """Makes buffers as SGLang's pools do."""

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


def test_of_sglangs_own_pools_those_of_more_than_keys_and_values_are_refused_by_name() -> None:
    others = [
        value
        for name, value in vars(memory_pool).items()
        if isinstance(value, type) and issubclass(value, KVCache) and name not in pools.SERVED_POOLS
    ]
    assert len(others) > 2
    for pool in others:
        with pytest.raises(SystemExit, match=f"in a {pool.__name__}, which cannot be elastic"):
            pools.check_class(pool)
    for pool in (MHATokenToKVPool, MLATokenToKVPool, HybridLinearKVPool, SWAKVPool):
        pools.check_class(pool)


def test_a_pool_of_more_than_keys_and_values_ends_the_start_before_it_takes_memory() -> None:
    arguments = {
        "size": ROWS,
        "page_size": 1,
        "dtype": torch.float16,
        "head_num": 2,
        "head_dim": 16,
        "layer_num": 1,
        "device": "cpu",
        "enable_memory_saver": False,
    }
    with (
        patch.object(engines, "_engine", object()),
        patch.object(KVCache, "__init__", hooks.kv_cache_init(KVCache.__init__)),
        patch.object(MHATokenToKVPoolFP4, "_create_buffers") as create_buffers,
        pytest.raises(SystemExit, match="MHATokenToKVPoolFP4"),
    ):
        MHATokenToKVPoolFP4(**arguments)
    create_buffers.assert_not_called()


def test_a_plane_is_as_long_as_the_ids_of_its_pages() -> None:
    shape = layer_tensors.PoolShape(num_planes=4, num_rows=100, row_bytes=16, block_tokens=2)
    geometry = Geometry(block_bytes=32, num_planes=4, ids_per_page=33, blocks_per_page=8)
    assert layer_tensors.num_rows(shape, geometry, 3) == (2 * 33 + 8) * 2
