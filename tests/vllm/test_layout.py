"""Both shapes of vLLM's KV cache plan lead to the same geometry and the same bytes."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from kvcached_core.errors import UnsupportedEngineError
from kvcached_core.memory.arena import Arena
from kvcached_core.memory.geometry import choose_geometry
from kvcached_core.memory.seats import Placement, Seat
from kvcached_core.memory.size_classes import SizeClass
from kvcached_core.memory.vmm.host import HostBackend
from kvcached_core.memory.zeros import ZerosFromArena
from kvcached_core.units import MIB
from kvcached_vllm.layout import connector_config, plane_layout, sparse_config

pytestmark = pytest.mark.vllm

BLOCK_BYTES = 65536
NUM_LAYERS = 6
NUM_BLOCKS = 128
LAYERS = [f"layers.{index}" for index in range(NUM_LAYERS)]


@dataclass
class SeparateTensor:
    """`KVCacheTensor` up to 0.28."""

    size: int
    shared_by: list[str]
    offset: int = 0
    block_stride: int = 0


@dataclass
class Plan:
    """`KVCacheConfig`, as far as it is read."""

    kv_cache_tensors: list[Any]
    num_blocks: int = NUM_BLOCKS
    kv_cache_groups: list[Any] = field(default_factory=list)


def separate_plan() -> Plan:
    return Plan([SeparateTensor(BLOCK_BYTES * NUM_BLOCKS, [layer]) for layer in LAYERS])


def strided_plan(**changes: Any) -> Plan:
    from vllm.v1.kv_cache_interface import KVCacheTensor

    values = {
        "size": BLOCK_BYTES * NUM_BLOCKS * NUM_LAYERS,
        "layers": LAYERS,
        "layer_stride": BLOCK_BYTES * NUM_BLOCKS,
        "block_stride": BLOCK_BYTES,
        "offset": 0,
        **changes,
    }
    return Plan([KVCacheTensor(**values)])


def placement() -> Placement:
    geometry = choose_geometry(
        block_bytes=BLOCK_BYTES,
        num_planes=NUM_LAYERS,
        granularity_bytes=2 * MIB,
        target_page_bytes=4 * MIB,
    )
    return Placement(geometry, NUM_BLOCKS // geometry.blocks_per_page, Seat("unused", 0, 1))


def test_both_shapes_have_the_same_planes() -> None:
    separate, strided = plane_layout(separate_plan()), plane_layout(strided_plan())
    assert separate.classes == strided.classes == (SizeClass(BLOCK_BYTES, NUM_LAYERS),)
    assert separate.num_planes(BLOCK_BYTES) == NUM_LAYERS
    assert separate.num_planes(BLOCK_BYTES // 2) == 0
    assert (separate.is_one_allocation, strided.is_one_allocation) == (False, True)


def separate_views(plan: Any) -> list[torch.Tensor]:
    """Allocate as vLLM does up to 0.28: a tensor per layer."""
    return [
        torch.zeros(tensor.size, dtype=torch.int8, device="cpu").view(-1, BLOCK_BYTES)
        for tensor in plan.kv_cache_tensors
    ]


def strided_views(plan: Any) -> list[torch.Tensor]:
    """Allocate as vLLM does from 0.29 on: one buffer, a view per layer."""
    (tensor,) = plan.kv_cache_tensors
    buffer = torch.zeros(tensor.size, dtype=torch.int8, device="cpu")
    shape = (NUM_LAYERS, plan.num_blocks, BLOCK_BYTES)
    strides = (tensor.layer_stride, tensor.block_stride, 1)
    return list(torch.as_strided(buffer, shape, strides, tensor.offset))


@pytest.mark.parametrize("shape", ["separate", "strided"])
def test_views_of_either_shape_lie_where_the_geometry_says(shape: str) -> None:
    plan = separate_plan() if shape == "separate" else strided_plan()
    where, layout = placement(), plane_layout(plan)
    arena = Arena(HostBackend(), where.geometry, where.num_pages)
    tensors = (
        [arena.plane_tensor(plane) for plane in range(NUM_LAYERS)]
        if shape == "separate"
        else [arena.tensor()]
    )
    sparse = sparse_config(plan, layout, where)
    with ZerosFromArena(tensors) as zeros:
        views = separate_views(sparse) if shape == "separate" else strided_views(sparse)
    assert zeros.num_left == 0
    geometry = where.geometry
    for plane, view in enumerate(views):
        assert view.shape[0] == geometry.num_ids(where.num_pages)
        for block in (0, 1, NUM_BLOCKS // 2, where.num_pages * geometry.blocks_per_page - 1):
            block_id = geometry.block_id(block)
            offset = view[block_id].data_ptr() - arena.address
            assert offset == geometry.block_offset(plane, block_id)
    arena.close()


def test_groups_that_overlay_each_other_share_planes() -> None:
    plan = strided_plan()
    other = strided_plan(layers=LAYERS[:2]).kv_cache_tensors[0]
    plan.kv_cache_tensors.append(other)
    layout = plane_layout(plan)
    assert layout.classes == (SizeClass(BLOCK_BYTES, NUM_LAYERS),)
    assert layout.places == ((0, BLOCK_BYTES), (0, BLOCK_BYTES))


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (Plan([]), "a rank of this model has no KV cache"),
        (
            Plan([SeparateTensor(BLOCK_BYTES * NUM_BLOCKS, [LAYERS[0]], block_stride=1)]),
            "spreads a block over its layer",
        ),
    ],
)
def test_plans_that_are_not_dense_planes_are_refused(plan: Plan, reason: str) -> None:
    with pytest.raises(UnsupportedEngineError, match=reason):
        plane_layout(plan)


def test_a_layout_that_spreads_a_block_is_refused_with_the_setting_to_change() -> None:
    plan = strided_plan(block_stride=BLOCK_BYTES // 2)
    with pytest.raises(UnsupportedEngineError, match="VLLM_KV_CACHE_LAYOUT=LBNHC"):
        plane_layout(plan)


def test_other_zeros_are_torchs_own() -> None:
    ours = torch.ones(64, dtype=torch.int8)
    with ZerosFromArena([ours]) as zeros:
        assert torch.zeros(64).dtype is torch.float32
        assert torch.zeros(32, dtype=torch.int8).numel() == 32
        assert zeros.num_left == 1
        assert torch.zeros(64, dtype=torch.int8, device="cpu") is ours
        assert not torch.zeros(64, dtype=torch.int8).any()


def test_tensors_that_begin_at_another_plane_stay_there() -> None:
    plane_bytes = BLOCK_BYTES * NUM_BLOCKS
    (first,) = strided_plan(layers=LAYERS[:2]).kv_cache_tensors
    (second,) = strided_plan(layers=LAYERS[2:], offset=2 * plane_bytes).kv_cache_tensors
    plan = Plan([first, second])
    layout = plane_layout(plan)
    assert layout.classes == (SizeClass(BLOCK_BYTES, NUM_LAYERS),)
    assert layout.places == ((0, BLOCK_BYTES), (2, BLOCK_BYTES))
    geometry = choose_geometry(
        block_bytes=BLOCK_BYTES, num_planes=NUM_LAYERS, granularity_bytes=2 * MIB
    )
    seat: Any = None
    sparse = sparse_config(plan, layout, Placement(geometry, 4, seat))
    offsets = [tensor.offset for tensor in sparse.kv_cache_tensors]
    assert offsets == [0, 2 * geometry.run_bytes]


@pytest.mark.parametrize("shape", ["separate", "strided"])
def test_a_connector_finds_the_bytes_of_a_block_that_the_scheduler_finds(shape: str) -> None:
    plan = separate_plan() if shape == "separate" else strided_plan()
    layout, where = plane_layout(plan), placement()
    sparse = connector_config(sparse_config(plan, layout, where), layout)
    assert sparse.num_blocks == where.geometry.num_ids(where.num_pages)

    def bytes_of_a_block(of_plan: Any) -> int:
        sizes = [tensor.size for tensor in of_plan.kv_cache_tensors]
        total = sum(sizes) if shape == "separate" else sizes[0]
        return int(total) // int(of_plan.num_blocks)

    assert bytes_of_a_block(sparse) == bytes_of_a_block(plan) == BLOCK_BYTES * NUM_LAYERS


def test_a_connectors_plan_leaves_that_of_the_memory_alone() -> None:
    plan = strided_plan()
    layout, where = plane_layout(plan), placement()
    sparse = sparse_config(plan, layout, where)
    (tensor,) = connector_config(sparse, layout).kv_cache_tensors
    assert sparse.kv_cache_tensors[0].size == where.num_pages * where.geometry.page_bytes
    assert tensor.block_stride == sparse.kv_cache_tensors[0].block_stride
