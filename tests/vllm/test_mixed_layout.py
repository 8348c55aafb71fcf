"""vLLM's plans of layers that differ in block size: each layer's blocks lie in our pages alone."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.configurations import configuration, parallel
from helpers.registered import assert_same_copies

from kvcached_core.config import HOST, read_config
from kvcached_core.errors import UnsupportedEngineError
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.memory.devices import Device
from kvcached_core.memory.mixed_arena import make_arena
from kvcached_core.memory.rank import RankMemory
from kvcached_core.memory.seats import Placement, Seat
from kvcached_core.memory.size_classes import SizeClass, choose_any
from kvcached_core.memory.vmm.host import HostBackend
from kvcached_core.memory.zeros import zeros_from
from kvcached_core.units import MIB
from kvcached_vllm.engine import VllmEngine
from kvcached_vllm.layout import (
    PLACEMENT,
    common_classes,
    connector_config,
    plane_layout,
    refuse_untried_copies,
    sparse_config,
    tensor_planes,
)
from kvcached_vllm.worker import block_ids, name_existing_blocks

pytestmark = pytest.mark.vllm

# As DeepSeek-V3.2's: latents of 576 elements in 16 bits, and an index of 132 bytes a token.
NUM_LAYERS, BLOCK_TOKENS = 6, 64
LATENT_BYTES, INDEX_BYTES = 73728, 8448
NUM_BLOCKS = 96
POOL = Device(HOST, "first", 1024 * MIB)


def sparse_attention_plan(num_layers: int = NUM_LAYERS) -> Any:
    """Let vLLM plan for latents and an index in each layer."""
    from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups
    from vllm.v1.kv_cache_interface import (
        KVCacheGroupSpec,
        MLAAttentionSpec,
        UniformTypeKVCacheSpecs,
    )

    sizes: dict[str, Any] = {"block_size": BLOCK_TOKENS, "num_kv_heads": 1}
    latent = MLAAttentionSpec(**sizes, head_size=576, dtype=torch.bfloat16)
    index = MLAAttentionSpec(**sizes, head_size=132, dtype=torch.uint8)
    specs = {}
    for layer in range(num_layers):
        specs[f"layers.{layer}.attn"] = latent
        specs[f"layers.{layer}.indexer"] = index
    uniform = UniformTypeKVCacheSpecs.from_specs(specs)
    assert uniform is not None
    cache = SimpleNamespace(
        get_resolved_kv_cache_layout=lambda: layout_of("LBNHC"),
        num_gpu_blocks_override=None,
        prefix_cache_retention_interval=None,
    )
    config = configuration(cache_config=cache)
    available = NUM_BLOCKS * uniform.page_size_bytes
    groups = [KVCacheGroupSpec(list(specs), uniform)]
    return get_kv_cache_config_from_groups(config, groups, available)


def layout_of(name: str) -> Any:
    from vllm.v1.kv_cache_interface import KVCacheLayout

    return KVCacheLayout[name]


def separate_plan() -> Any:
    """Return such a plan as vLLM has it up to 0.28: a tensor for each layer."""
    sizes = [LATENT_BYTES, INDEX_BYTES] * NUM_LAYERS
    tensors = [SeparateTensor(size * NUM_BLOCKS) for size in sizes]
    return SimpleNamespace(kv_cache_tensors=tensors, num_blocks=NUM_BLOCKS, kv_cache_groups=[])


@dataclass
class SeparateTensor:
    """`KVCacheTensor` up to 0.28, as far as it is read."""

    size: int
    block_stride: int = 0


def place(layout: Any) -> Placement:
    geometry = choose_any(
        common_classes([layout]), granularity_bytes=2 * MIB, target_page_bytes=8 * MIB
    )
    return Placement(geometry, 3, Seat("unused", 0, 1))  # type: ignore[arg-type]  nobody sits


def strided_views(plan: Any, arena: Any) -> list[torch.Tensor]:
    """Let vLLM allocate and view the plan; a layer's view is its blocks' bytes."""
    from vllm.v1.worker.utils import allocate_kv_cache

    with zeros_from(arena):
        views = allocate_kv_cache(plan, torch.device("cpu"), layout_of("LBNHC"))
    return list(views.values())


def separate_views(plan: Any, arena: Any) -> list[torch.Tensor]:
    geometry = arena.geometry
    planes = tensor_planes(plane_layout(separate_plan()), geometry)
    with zeros_from(arena, planes):
        tensors = [
            torch.zeros(tensor.size, dtype=torch.int8, device="cpu")
            for tensor in plan.kv_cache_tensors
        ]
    sizes = [LATENT_BYTES, INDEX_BYTES] * NUM_LAYERS
    return [tensor.view(-1, size) for tensor, size in zip(tensors, sizes, strict=True)]


VIEWS: Any = {
    "separate": (separate_plan, separate_views),
    "strided": (sparse_attention_plan, strided_views),
}


@pytest.mark.parametrize("shape", VIEWS)
def test_vllms_own_views_lie_in_handles_and_none_over_another(shape: str) -> None:
    make_plan, make_views = VIEWS[shape]
    plan = make_plan()
    layout = plane_layout(plan)
    assert layout.classes == (
        SizeClass(LATENT_BYTES, NUM_LAYERS),
        SizeClass(INDEX_BYTES, NUM_LAYERS),
    )
    assert layout.bytes_of_block == NUM_LAYERS * (LATENT_BYTES + INDEX_BYTES)
    where = place(layout)
    geometry, arena = where.geometry, make_arena(HostBackend(), where.geometry, where.num_pages)
    arena.map(range(where.num_pages))
    views = make_views(sparse_config(plan, layout, where), arena)
    assert len(views) == 2 * NUM_LAYERS
    assert {view.shape[0] for view in views} == {geometry.num_ids(where.num_pages)}
    last = where.num_pages * geometry.blocks_per_page - 1
    ids = [geometry.block_id(block) for block in (0, 1, last // 2, last)]
    spans = []
    for view, block_id in itertools.product(views, ids):
        block = view[block_id]
        start = block.data_ptr() - arena.address
        spans.append((start, start + block.numel() * block.element_size()))
        block.view(torch.int8).fill_(1)  # what is not mapped would end the process
    spans.sort()
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert sorted({end - start for start, end in spans}) == [INDEX_BYTES, LATENT_BYTES]
    assert spans[-1][1] <= arena.num_bytes
    views.clear()
    arena.close()


def test_tensors_of_one_size_that_stand_apart_are_planes_of_one_class() -> None:
    plan = separate_plan()
    assert plane_layout(plan).places[:4] == (
        (0, LATENT_BYTES),
        (0, INDEX_BYTES),
        (1, LATENT_BYTES),
        (1, INDEX_BYTES),
    )


def test_groups_of_other_block_sizes_that_share_memory_are_refused() -> None:
    plan = sparse_attention_plan()
    plan.kv_cache_tensors[1].offset = 0
    with pytest.raises(UnsupportedEngineError, match="--disable-hybrid-kv-cache-manager"):
        plane_layout(plan)


def test_a_connector_finds_the_bytes_of_a_block_in_all_sizes_together() -> None:
    plan = sparse_attention_plan()
    layout = plane_layout(plan)
    sparse = connector_config(sparse_config(plan, layout, place(layout)), layout)
    assert sparse.num_blocks > NUM_BLOCKS
    for each in (plan, sparse):
        (size,) = {tensor.size for tensor in each.kv_cache_tensors}
        assert size == each.num_blocks * NUM_LAYERS * (LATENT_BYTES + INDEX_BYTES)


def test_a_connector_beside_several_block_sizes_is_refused_where_nobody_has_tried_it() -> None:
    refuse_untried_copies([plane_layout(sparse_attention_plan())])
    plan = separate_plan()
    with pytest.raises(UnsupportedEngineError, match=r"differ in block size.*-offloading-size"):
        refuse_untried_copies([plane_layout(plan)])
    plan.kv_cache_tensors = plan.kv_cache_tensors[::2]
    refuse_untried_copies([plane_layout(plan)])


def test_a_connector_copies_of_a_block_what_it_copies_in_vllms_own_memory() -> None:
    from vllm.v1.worker.utils import allocate_kv_cache

    plan = sparse_attention_plan()
    layout = plane_layout(plan)
    where = place(layout)
    arena = make_arena(HostBackend(), where.geometry, where.num_pages)
    arena.map([0, 2])
    sparse = sparse_config(plan, layout, where)
    with zeros_from(arena):
        views = allocate_kv_cache(sparse, torch.device("cpu"), layout_of("LBNHC"))
    dense = allocate_kv_cache(plan, torch.device("cpu"), layout_of("LBNHC"))
    last = where.geometry.block_id(3 * where.geometry.blocks_per_page - 1)
    ids = [1, where.geometry.block_id(2 * where.geometry.blocks_per_page), last]
    assert_same_copies((connector_config(sparse, layout), views), (plan, dense), ids)
    views.clear()
    arena.close()


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[VllmEngine]:
    config = read_config({"KVCACHED_DIR": str(tmp_path / "kv")})
    model = SimpleNamespace(model="m", max_model_len=512)
    core = SimpleNamespace(model_executor=None, scheduler=None)
    vllm_config = configuration(
        model_config=model,
        scheduler_config=SimpleNamespace(max_num_batched_tokens=512),
        parallel_config=parallel(decode_context_parallel_size=1, prefill_context_parallel_size=1),
    )
    made = VllmEngine(vllm_config, config, [POOL, POOL], core)
    yield made
    made.close()


def test_ranks_of_different_depth_have_pages_of_one_size_and_the_ledger_counts_all_classes(
    engine: VllmEngine,
) -> None:
    plans = [sparse_attention_plan(), sparse_attention_plan(4)]
    engine.place(plans, 2 * MIB)
    deep, shallow = (getattr(plan, PLACEMENT) for plan in plans)
    assert deep.geometry.page_bytes == shallow.geometry.page_bytes == engine.instance.page_bytes
    assert deep.geometry.handle_bytes == shallow.geometry.handle_bytes
    assert engine.block_bytes == 10 * (LATENT_BYTES + INDEX_BYTES)
    with Ledger(Path(deep.seat.ledger_path)) as ledger:
        (view,) = ledger.view().instances
        assert view.promised_bytes == 2 * deep.geometry.page_bytes
        assert view.token_bytes == 2 * NUM_LAYERS * (LATENT_BYTES + INDEX_BYTES) // BLOCK_TOKENS
    memory = RankMemory(deep.geometry, deep.num_pages, deep.seat, HostBackend())
    assert memory.arena.resident_bytes == deep.geometry.page_bytes
    memory.close()


def test_a_step_of_the_warm_up_names_blocks_that_exist() -> None:
    where = place(plane_layout(separate_plan()))
    geometry = where.geometry
    memory: Any = SimpleNamespace(
        arena=SimpleNamespace(geometry=geometry, num_pages=where.num_pages)
    )
    made_up = [1, geometry.blocks_per_page, geometry.ids_per_page - 1, geometry.ids_per_page]
    shared = list(made_up)
    step = SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(block_ids=(shared,))],
        scheduled_cached_reqs=SimpleNamespace(new_block_ids=[(shared,), None]),
    )
    name_existing_blocks(step, memory)
    named = list(block_ids(step))
    assert all(geometry.exists(number) for number in named)
    assert max(map(geometry.page_of, named)) < where.num_pages
    assert named[:4] == named[4:]  # a list that is named twice means the same both times
    assert (named[0], named[3]) == (1, geometry.ids_per_page)

    memory.arena.geometry = choose_any([SizeClass(4096, 3)], granularity_bytes=4096)
    gap = memory.arena.geometry.ids_per_page - 1
    alone = SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(block_ids=([gap],))],
        scheduled_cached_reqs=SimpleNamespace(new_block_ids=[]),
    )
    name_existing_blocks(alone, memory)
    assert list(block_ids(alone)) == [gap]  # mapped with its pages, as ever
