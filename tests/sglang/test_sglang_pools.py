"""Which KV pools of SGLang's can be elastic: the others end the start, by name."""

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

from kvcached_sglang import engine as engines
from kvcached_sglang import hooks, pools

pytestmark = pytest.mark.sglang

ROWS = 1024


def test_of_sglangs_own_pools_those_that_cannot_lie_in_pages_are_refused_by_name() -> None:
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


def test_a_pool_that_cannot_lie_in_pages_ends_the_start_before_it_takes_memory() -> None:
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
