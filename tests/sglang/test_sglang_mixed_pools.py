"""SGLang's pools whose planes differ in block size, over our arena: each block is its own."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.sglang_elastic import hooked, make_engine
from sglang.srt.mem_cache import memory_pool
from sglang.srt.mem_cache.memory_pool import (
    DSATokenToKVPool,
    KVCache,
    MHATokenToKVPool,
    MLATokenToKVPool,
)

from kvcached_core.memory.size_classes import MixedGeometry
from kvcached_core.units import MIB
from kvcached_sglang import engine as engines
from kvcached_sglang import hooks, index_pool
from kvcached_sglang.engine import SglangEngine

pytestmark = pytest.mark.sglang

SCALED_POOL: Any = getattr(memory_pool, "MHATokenToKVPoolMXFP8", None)
COMMON: dict[str, Any] = {"device": "cpu", "enable_memory_saver": False}
KEYS_AND_VALUES = COMMON | {
    "dtype": torch.float16,
    "head_num": 2,
    "head_dim": 64,
    "v_head_dim": 32,
    "layer_num": 3,
}
SPARSE = COMMON | {
    "page_size": 64,
    "dtype": torch.bfloat16,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "kv_cache_dim": 576,
    "index_head_dim": 128,
    "layer_num": 3,
}


@contextmanager
def served_by(made: SglangEngine) -> Iterator[SglangEngine]:
    """Let SGLang's pools find an engine, and take its memory away at the end."""
    with ExitStack() as stack:
        if hasattr(memory_pool, "get_parallel"):  # later releases ask what a server has said
            stack.enter_context(memory_pool.get_parallel().override(attn_dcp_size=1))
        hook = [(MHATokenToKVPool, "_create_buffers", hooks.create_buffers)]
        hook += [(MLATokenToKVPool, "_create_buffers", hooks.create_buffers)]
        hook += [(DSATokenToKVPool, "__init__", index_pool.sparse_attention_init)]
        hook += [(KVCache, "__init__", hooks.kv_cache_init)]
        if SCALED_POOL is not None:
            hook += [(SCALED_POOL, "_create_buffers", hooks.create_buffers)]
        stack.enter_context(hooked(made, *hook))
        yield made
    if made.memory is not None:
        made.memory.close()
    made.close()


@pytest.fixture
def ours(tmp_path: Path) -> Iterator[SglangEngine]:
    made = make_engine(tmp_path / "kv", host_pool=512 * MIB, page_bytes=4 * MIB)
    with served_by(made):
        yield made


def check(ours: SglangEngine, planes: list[torch.Tensor]) -> MixedGeometry:
    """Write all blocks of two pages in every plane, and read them."""
    (geometry,) = ours.placing.geometries
    assert isinstance(geometry, MixedGeometry)
    memory = ours.memory
    assert memory is not None
    arena = memory.arena
    assert arena.resident_pages == [0]
    assert arena.resident_bytes == geometry.page_bytes <= 128 * MIB
    arena.map([3])
    per_page = geometry.blocks_per_page
    ids = torch.tensor(
        [
            geometry.block_id(block)
            for block in (*range(per_page), *range(3 * per_page, 4 * per_page))
        ]
    )
    num_ids = geometry.num_ids(arena.num_pages)
    as_bytes = [plane.view(num_ids, -1).view(torch.uint8) for plane in planes]
    for number, plane in enumerate(as_bytes):
        assert plane.data_ptr() >= arena.address
        assert not plane[ids].any()
        plane[ids] = number + 1
    assert all(bool((plane[ids] == n + 1).all()) for n, plane in enumerate(as_bytes))
    assert sum(each.num_planes for each in geometry.classes) == len(planes)
    assert sum(plane[0].numel() for plane in as_bytes) == sum(
        each.num_planes * each.block_bytes for each in geometry.classes
    )
    return geometry


@pytest.mark.parametrize("page_size", [1, 16])
def test_keys_and_values_of_two_sizes_lie_in_pages(ours: SglangEngine, page_size: int) -> None:
    pool = MHATokenToKVPool(size=16 * 4095, page_size=page_size, **KEYS_AND_VALUES)
    geometry = check(ours, [*pool.k_buffer, *pool.v_buffer])
    sizes = [(each.block_bytes, each.num_planes) for each in geometry.classes]
    assert sizes == [(256 * page_size, 3), (128 * page_size, 3)]
    assert pool.k_buffer[0].shape[1:] == (2, 64)
    assert pool.v_buffer[0].shape[1:] == (2, 32)
    assert pool.size == geometry.num_ids(ours.placing.num_pages) * page_size - page_size
    pool.k_buffer.clear()
    pool.v_buffer.clear()


@pytest.mark.skipif(SCALED_POOL is None, reason="this release has no such pool")
@pytest.mark.parametrize("page_size", [64, 128])
def test_keys_and_values_lie_in_pages_with_their_scales(ours: SglangEngine, page_size: int) -> None:
    pool = SCALED_POOL(size=128 * 4095, page_size=page_size, **KEYS_AND_VALUES)
    buffers = (pool.k_buffer, pool.v_buffer, pool.k_scale_buffer, pool.v_scale_buffer)
    geometry = check(ours, [plane for each in buffers for plane in each])
    sizes = [(each.block_bytes, each.num_planes) for each in geometry.classes]
    rows = [128, 64, 4, 2]  # a byte for each element, and one for each 32 of them
    assert sizes == [(row * page_size, 3) for row in rows]
    for each in buffers:
        each.clear()


def index_of(pool: Any) -> list[torch.Tensor]:
    return [*pool.index_k_with_scale_buffer]


@pytest.mark.parametrize("size", [64 * 255, 64 * 255 - 1])
def test_the_index_of_sparse_attention_lies_in_pages_with_its_latents(
    ours: SglangEngine, size: int
) -> None:
    pool = DSATokenToKVPool(size=size, **SPARSE)
    geometry = check(ours, [*pool.kv_buffer, *index_of(pool)])
    sizes = [(each.block_bytes, each.num_planes) for each in geometry.classes]
    assert sizes == [(73728, 3), (8448, 3)]
    assert geometry.ids_per_page % 8192 == 0
    assert index_of(pool)[0].shape == (geometry.num_ids(ours.placing.num_pages), 8448)
    assert pool.size == geometry.num_ids(ours.placing.num_pages) * 64 - 64
    assert pool.kvcached == geometry
    pool.kv_buffer.clear()
    pool.index_k_with_scale_buffer.clear()


def test_without_an_engine_of_ours_such_a_pool_is_as_ever(
    ours: SglangEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "_engine", None)
    pool = DSATokenToKVPool(size=640, **SPARSE)
    assert (pool.size, index_of(pool)[0].shape) == (640, (11, 8448))
    assert not hasattr(pool, "kvcached")
    assert ours.memory is None


def test_an_index_with_a_size_of_its_own_ends_the_start(ours: SglangEngine) -> None:
    with pytest.raises(SystemExit, match="size of its own cannot be elastic"):
        DSATokenToKVPool(size=640, index_buf_size=1280, **SPARSE)
    assert ours.memory is None


def test_a_host_tier_beside_planes_of_several_sizes_ends_the_start(ours: SglangEngine) -> None:
    ours.copies = SimpleNamespace()  # type: ignore[assignment]  only that it is there
    with pytest.raises(SystemExit, match="remove --enable-hierarchical-cache"):
        MHATokenToKVPool(size=65536, page_size=1, **KEYS_AND_VALUES)
    ours.copies = None


def test_drafts_beside_planes_of_several_sizes_end_the_start(ours: SglangEngine) -> None:
    kind = SimpleNamespace(attention_arch=SimpleNamespace(name="MLA"))
    ours.drafts.add(SimpleNamespace(num_effective_layers=1, model_config=kind))
    for make, sizes in (
        (lambda: MHATokenToKVPool(size=65536, page_size=1, **KEYS_AND_VALUES), "256, 128"),
        (lambda: DSATokenToKVPool(size=64 * 255, **SPARSE), "73728, 8448"),
    ):
        with pytest.raises(SystemExit, match=rf"target's planes differ .*\[{sizes}\] bytes"):
            make()
    assert ours.memory is None


def test_a_draft_of_another_kind_than_its_target_ends_the_start(ours: SglangEngine) -> None:
    kind = SimpleNamespace(attention_arch=SimpleNamespace(name="MLA"))
    ours.drafts.add(SimpleNamespace(num_effective_layers=1, model_config=kind))
    alone = KEYS_AND_VALUES | {"v_head_dim": 64}
    pool = MHATokenToKVPool(size=65536, page_size=1, **alone)
    with pytest.raises(SystemExit, match="draft's planes differ"):
        MHATokenToKVPool(size=65536, page_size=1, **KEYS_AND_VALUES)
    with pytest.raises(SystemExit, match="a draft with sparse attention cannot be elastic"):
        DSATokenToKVPool(size=64 * 255, **SPARSE)
    pool.k_buffer.clear()
    pool.v_buffer.clear()


def test_tokens_whose_numbers_have_more_than_31_bits_end_the_start(tmp_path: Path) -> None:
    made = make_engine(tmp_path / "kv", host_pool=512 * 1024 * MIB, page_bytes=2 * MIB)
    with (
        served_by(made),
        pytest.raises(SystemExit, match=r"numbers of tokens up to \d+.*lower KVCACHED_LIMIT"),
    ):
        DSATokenToKVPool(size=64 * 1_500_000, **SPARSE)
