"""SGLang's layout with tokens inside heads: a block is one piece, and lies where it should."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.sglang_elastic import hooked, make_engine
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from kvcached_core.units import MIB
from kvcached_sglang import hooks

pytestmark = pytest.mark.sglang

BLOCK_TOKENS, NUM_TOKENS = 4, 6140
NUM_HEADS, HEAD_DIM, NUM_LAYERS = 2, 256, 2
BLOCK_BYTES = BLOCK_TOKENS * NUM_HEADS * HEAD_DIM * 4


@pytest.mark.parametrize("v_head_dim", [HEAD_DIM, HEAD_DIM // 2])
def test_each_block_of_each_layer_is_one_piece_of_its_page(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, v_head_dim: int
) -> None:
    monkeypatch.setenv("SGLANG_USE_HND_KVCACHE", "1")
    engine = make_engine(tmp_path / "kv", host_pool=64 * MIB, page_bytes=2 * MIB)
    with hooked(engine, (MHATokenToKVPool, "_create_buffers", hooks.create_buffers)):
        pool: Any = MHATokenToKVPool(
            size=NUM_TOKENS,
            page_size=BLOCK_TOKENS,
            dtype=torch.float32,
            head_num=NUM_HEADS,
            head_dim=HEAD_DIM,
            v_head_dim=v_head_dim,
            layer_num=NUM_LAYERS,
            device="cpu",
            enable_memory_saver=False,
        )
    memory, geometry = engine.memory, pool.kvcached
    assert memory is not None
    last = memory.arena.num_pages - 1
    memory.arena.map([last])
    assert pool.num_pages == geometry.num_ids(memory.arena.num_pages)
    first_id = geometry.block_id(last * geometry.blocks_per_page)
    blocks = slice(first_id, first_id + geometry.blocks_per_page)
    planes = [*pool.k_buffer, *pool.v_buffer]
    assert {plane.shape[:3] for plane in planes} == {(pool.num_pages, NUM_HEADS, BLOCK_TOKENS)}
    for number, plane in enumerate(planes):
        plane[blocks] = float(number)  # what is not mapped would end the process
    for number, plane in enumerate(planes):
        assert bool((plane[blocks] == number).all())
        assert plane[first_id].is_contiguous()
        assert plane.stride(0) * 4 == BLOCK_BYTES * plane.shape[3] // HEAD_DIM
    pool.k_buffer.clear()
    pool.v_buffer.clear()
    planes.clear()
    del plane
    memory.close()
    engine.close()
