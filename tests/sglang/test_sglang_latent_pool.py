"""SGLang's pool of latent keys and values (MLA) over our arena: one plane for each layer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.sglang_elastic import hooked, make_engine
from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

from kvcached_core.units import MIB
from kvcached_sglang import hooks

pytestmark = pytest.mark.sglang

NUM_LAYERS, LATENT, ROPE = 3, 512, 64
SIZE = 16383


def build() -> Any:
    return MLATokenToKVPool(
        size=SIZE,
        page_size=1,
        dtype=torch.float16,
        kv_lora_rank=LATENT,
        qk_rope_head_dim=ROPE,
        layer_num=NUM_LAYERS,
        device="cpu",
        enable_memory_saver=False,
    )


def test_latent_planes_lie_in_pages_and_keep_what_is_written_to_open_ones(tmp_path: Path) -> None:
    ours = make_engine(tmp_path / "kv", host_pool=64 * MIB)
    with hooked(ours, (MLATokenToKVPool, "_create_buffers", hooks.create_buffers)):
        pool = build()
    vanilla = build()
    memory, (geometry,) = ours.memory, ours.placing.geometries
    assert memory is not None
    assert geometry.num_planes == NUM_LAYERS
    assert geometry.block_bytes == (LATENT + ROPE) * 2
    assert memory.arena.resident_pages == [0]
    assert memory.arena.resident_bytes < 32 * MIB
    num_blocks = geometry.blocks_per_page  # all of page 0
    for layer in range(NUM_LAYERS):
        rows = torch.rand(num_blocks, 1, LATENT + ROPE, dtype=torch.float32).half()
        ids = torch.tensor([geometry.block_id(index) for index in range(num_blocks)])
        pool.kv_buffer[layer][ids] = rows
        vanilla.kv_buffer[layer][:num_blocks] = rows
    for layer in range(NUM_LAYERS):
        assert torch.equal(pool.kv_buffer[layer][ids], vanilla.kv_buffer[layer][:num_blocks])
        assert pool.kv_buffer[layer].stride() == vanilla.kv_buffer[layer].stride()
    pool.kv_buffer.clear()
    memory.close()
    ours.close()
