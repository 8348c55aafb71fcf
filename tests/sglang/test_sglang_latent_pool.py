"""SGLang's pool of latent keys and values (MLA) over our arena: one plane for each layer."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

from kvcached_core.config import read_config
from kvcached_core.units import MIB
from kvcached_sglang import engine as engines
from kvcached_sglang import hooks
from kvcached_sglang.engine import ElasticEngine

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
    config = read_config({"KVCACHED_DIR": str(tmp_path / "kv"), "KVCACHED_HOST_POOL": "64MiB"})
    arguments = SimpleNamespace(served_model_name="m", model_path="m", max_prefill_tokens=1024)
    ours = ElasticEngine("cpu", arguments, 64, config, SimpleNamespace(world_size=1))
    make_buffers = hooks.create_buffers(MLATokenToKVPool._create_buffers)
    with (
        patch.object(engines, "_engine", ours),
        patch.object(MLATokenToKVPool, "_create_buffers", make_buffers),
    ):
        pool = build()
    vanilla = build()
    memory, (geometry,) = ours.memory, ours.layout.geometries
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
