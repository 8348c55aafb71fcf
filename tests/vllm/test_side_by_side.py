"""vLLM's layouts that put what layers have of a block side by side: one plane for all of them."""

import itertools
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.configurations import configuration
from helpers.registered import assert_same_copies

from kvcached_core.errors import UnsupportedEngineError
from kvcached_core.memory.mixed_arena import make_arena
from kvcached_core.memory.seats import Placement, Seat
from kvcached_core.memory.size_classes import SizeClass, choose_any
from kvcached_core.memory.vmm.host import HostBackend
from kvcached_core.memory.zeros import zeros_from
from kvcached_core.units import MIB
from kvcached_vllm.layout import (
    connector_config,
    plane_layout,
    refuse_untried_copies,
    sparse_config,
    tensor_planes,
)

pytestmark = pytest.mark.vllm

NUM_LAYERS, NUM_BLOCKS, NUM_PAGES = 6, 96, 3
LAYOUTS = ("BLNHC", "BLHNC", "BHLNC")
# Layers of two sizes, as Gemma's: a block of theirs has 48 KiB, which no page of 8 MiB divides.
WIDE_BYTES, NARROW_BYTES = 16384, 4096


def layout_of(name: str) -> Any:
    from vllm.v1.kv_cache_interface import KVCacheLayout

    return KVCacheLayout[name]


def spec(kind: str, num_heads: int) -> Any:
    from vllm.v1 import kv_cache_interface

    window = {"sliding_window": 64} if kind.startswith("Sliding") else {}
    sizes = {"block_size": 16, "num_kv_heads": num_heads, "head_size": 32}
    return getattr(kv_cache_interface, kind)(**sizes, dtype=torch.float32, **window)


def plan_of(layout: str, groups: list[tuple[int, Any]]) -> Any:
    """Let vLLM plan for groups of so many layers of a kind each."""
    from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups
    from vllm.v1.kv_cache_interface import KVCacheGroupSpec

    cache = SimpleNamespace(
        get_resolved_kv_cache_layout=lambda: layout_of(layout),
        num_gpu_blocks_override=None,
        prefix_cache_retention_interval=None,
    )
    made = [
        KVCacheGroupSpec([f"{number}.{layer}" for layer in range(num_layers)], each)
        for number, (num_layers, each) in enumerate(groups)
    ]
    block_bytes = max(num_layers * each.page_size_bytes for num_layers, each in groups)
    return get_kv_cache_config_from_groups(
        configuration(cache_config=cache), made, NUM_BLOCKS * block_bytes
    )


@dataclass
class OlderTensor:
    """`KVCacheTensor` up to 0.28, as far as it is read."""

    size: int
    offset: int
    block_stride: int


def place(layout: Any) -> Placement:
    geometry = choose_any(layout.classes, granularity_bytes=2 * MIB, target_page_bytes=8 * MIB)
    return Placement(geometry, NUM_PAGES, Seat("unused", 0, 1))  # type: ignore[arg-type]


def allocate(plan: Any, layout: str) -> tuple[Any, list[torch.Tensor]]:
    """Let vLLM allocate and view a plan in our pages, all of them mapped."""
    from vllm.v1.worker.utils import allocate_kv_cache

    planes = plane_layout(plan)
    where = place(planes)
    arena = make_arena(HostBackend(), where.geometry, where.num_pages)
    arena.map(range(NUM_PAGES))
    with zeros_from(arena):
        sparse = sparse_config(plan, planes, where)
        views = allocate_kv_cache(sparse, torch.device("cpu"), layout_of(layout))
    return arena, list(views.values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layer_has_its_own_bytes_of_each_block_and_of_no_other(layout: str) -> None:
    plan = plan_of(layout, [(NUM_LAYERS, spec("FullAttentionSpec", 4))])
    planes = plane_layout(plan)
    assert planes.classes == (SizeClass(NUM_LAYERS * WIDE_BYTES, 1),)
    assert planes.is_side_by_side
    arena, views = allocate(plan, layout)
    geometry = arena.geometry
    last = NUM_PAGES * geometry.blocks_per_page - 1
    blocks = [geometry.block_id(block) for block in (0, 1, last // 2, last)]
    numbers = list(enumerate(itertools.product(blocks, range(NUM_LAYERS)), start=1))
    for number, (block_id, layer) in numbers:
        views[layer][block_id].fill_(number)  # what is not mapped would end the process
    for number, (block_id, layer) in numbers:
        assert bool((views[layer][block_id] == number).all())
    for block_id in blocks:  # all that a block has lies where its page is
        start = geometry.block_offset(0, block_id)
        whole = arena.plane_tensor(0)[start : start + geometry.block_bytes].view(torch.float32)
        assert bool((whole > 0).all())
    views.clear()
    arena.close()


@pytest.mark.parametrize("layout", ["BLNHC", "BLHNC"])
def test_groups_of_layers_that_differ_in_size_share_the_bytes_of_a_block(layout: str) -> None:
    plan = plan_of(layout, [(2, spec("FullAttentionSpec", 4)), (9, spec("SlidingWindowSpec", 1))])
    planes = plane_layout(plan)
    assert planes.classes == (SizeClass(9 * NARROW_BYTES, 1),)  # the group that needs most
    arena, views = allocate(plan, layout)
    geometry = arena.geometry
    last = geometry.block_id(NUM_PAGES * geometry.blocks_per_page - 1)
    for view in views:
        start = view[last].data_ptr() - arena.address - geometry.block_offset(0, last)
        assert 0 <= start <= geometry.block_bytes - NARROW_BYTES
        view[last].fill_(1.0)
    views.clear()
    arena.close()


@pytest.mark.parametrize("layout", ["LBNHC", "LBHNC", "LHBNC"])
def test_vllm_plans_no_groups_of_two_sizes_with_layers_outside_of_blocks(layout: str) -> None:
    groups = [(2, spec("FullAttentionSpec", 4)), (9, spec("SlidingWindowSpec", 1))]
    with pytest.raises(ValueError, match="mixed page sizes"):
        plan_of(layout, groups)


def test_a_page_is_not_as_large_as_whole_blocks_and_whole_granules_would_make_it() -> None:
    block_bytes = 9 * NARROW_BYTES
    geometry = choose_any(
        [SizeClass(block_bytes, 1)], granularity_bytes=2 * MIB, target_page_bytes=MIB
    )
    assert geometry.page_bytes <= 8 * MIB
    assert geometry.blocks_per_page * block_bytes <= geometry.page_bytes
    assert geometry.waste < 0.03


def test_releases_with_a_tensor_for_each_layer_allocate_one_for_all_of_them() -> None:
    block_bytes = 2 * WIDE_BYTES + NARROW_BYTES
    offsets = (0, WIDE_BYTES, 2 * WIDE_BYTES)
    plan = SimpleNamespace(
        num_blocks=NUM_BLOCKS,
        kv_cache_tensors=[
            OlderTensor(block_bytes * NUM_BLOCKS, each, block_bytes) for each in offsets
        ],
    )
    planes = plane_layout(plan)
    assert planes.classes == (SizeClass(block_bytes, 1),)
    where = place(planes)
    geometry = where.geometry
    sparse = sparse_config(plan, planes, where)
    arena = make_arena(HostBackend(), geometry, where.num_pages)
    arena.map([NUM_PAGES - 1])
    with zeros_from(arena, tensor_planes(planes, geometry)):
        backing = torch.zeros(sparse.kv_cache_tensors[0].size, dtype=torch.int8, device="cpu")
    assert len({each.size for each in sparse.kv_cache_tensors}) == 1
    assert [each.offset for each in sparse.kv_cache_tensors] == list(offsets)
    last = geometry.block_id(NUM_PAGES * geometry.blocks_per_page - 1)
    backing.view(-1, block_bytes)[last].fill_(1)
    del backing
    arena.close()


def test_a_block_that_is_in_pieces_is_refused() -> None:
    plan = plan_of("LHBNC", [(NUM_LAYERS, spec("FullAttentionSpec", 4))])
    with pytest.raises(UnsupportedEngineError, match="VLLM_KV_CACHE_LAYOUT=LBNHC"):
        plane_layout(plan)


def test_a_connector_beside_it_is_refused_where_nobody_has_tried_it() -> None:
    beside = plane_layout(plan_of("BLNHC", [(NUM_LAYERS, spec("FullAttentionSpec", 4))]))
    refuse_untried_copies([beside])
    older = replace(beside, is_one_allocation=False)
    with pytest.raises(UnsupportedEngineError, match=r"side by side in one.*0\.29; remove"):
        refuse_untried_copies([beside, older])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_connector_copies_of_a_block_what_it_copies_in_vllms_own_memory(layout: str) -> None:
    from vllm.v1.worker.utils import allocate_kv_cache

    plan = plan_of(layout, [(NUM_LAYERS, spec("FullAttentionSpec", 4))])
    planes = plane_layout(plan)
    where = place(planes)
    arena = make_arena(HostBackend(), where.geometry, where.num_pages)
    arena.map([0, NUM_PAGES - 1])
    sparse = sparse_config(plan, planes, where)
    with zeros_from(arena):
        views = allocate_kv_cache(sparse, torch.device("cpu"), layout_of(layout))
    dense = allocate_kv_cache(plan, torch.device("cpu"), layout_of(layout))
    last = where.geometry.block_id(NUM_PAGES * where.geometry.blocks_per_page - 1)
    first = where.geometry.block_id((NUM_PAGES - 1) * where.geometry.blocks_per_page)
    assert_same_copies((connector_config(sparse, planes), views), (plan, dense), [1, first, last])
    views.clear()
    arena.close()
