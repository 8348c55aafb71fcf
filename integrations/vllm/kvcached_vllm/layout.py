"""vLLM's plan for its KV cache in the words of our geometry, and back.

Two shapes of the plan exist and both are served here: up to 0.28 one tensor per plane
(`KVCacheTensor.shared_by`), from 0.29 on one allocation with a stride per layer
(`KVCacheTensor.layers`). Which one it is shows in the plan itself.
"""

import copy
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from kvcached_core.errors import UnsupportedEngineError
from kvcached_core.memory.geometry import only_size
from kvcached_core.memory.seats import Placement


@dataclass(frozen=True)
class PlaneLayout:
    """The planes in a `KVCacheConfig`.

    Attributes:
        block_bytes: Bytes of one block in one plane.
        num_planes: Distinct planes; cache groups that overlay each other share theirs.
        first_planes: For each of the config's tensors, the plane of its first layer.
        is_one_allocation: Whether vLLM allocates all planes at once (from 0.29 on).
    """

    block_bytes: int
    num_planes: int
    first_planes: tuple[int, ...]
    is_one_allocation: bool


PLACEMENT = "kvcached_placement"  # as what a worker's `Placement` travels with its `KVCacheConfig`


def plane_layout(kv_cache_config: Any) -> PlaneLayout:
    """Return the planes of `kv_cache_config`.

    Raises:
        UnsupportedEngineError: If they are not dense and of one block size.
    """
    tensors = kv_cache_config.kv_cache_tensors
    if not tensors:
        raise UnsupportedEngineError(
            "a rank of this model has no KV cache; start it with fewer pipeline stages"
        )
    if hasattr(tensors[0], "layers"):
        return _strided_layout(tensors, kv_cache_config.num_blocks)
    return _separate_layout(tensors, kv_cache_config.num_blocks)


def request_blocks(kv_cache_config: Any, vllm_config: Any) -> int:
    """Return how many blocks the longest request needs, of all groups together."""
    return sum(
        ceil(
            group.kv_cache_spec.max_memory_usage_bytes(vllm_config)
            / group.kv_cache_spec.page_size_bytes
        )
        for group in kv_cache_config.kv_cache_groups
    )


def sparse_config(kv_cache_config: Any, layout: PlaneLayout, placement: Placement) -> Any:
    """Return a copy of the plan whose tensors lie in pages and are as long as the id space."""
    geometry = placement.geometry
    config = copy.deepcopy(kv_cache_config)
    config.num_blocks = num_ids = geometry.num_ids(placement.num_pages)
    for index, plane in enumerate(layout.first_planes):
        changes = {"size": num_ids * geometry.block_bytes}
        if layout.is_one_allocation:
            changes = {
                "size": placement.num_pages * geometry.page_bytes,
                "layer_stride": geometry.run_bytes,
                "block_stride": geometry.block_bytes,
                "offset": geometry.plane_offset(plane),
            }
        config.kv_cache_tensors[index] = replace(config.kv_cache_tensors[index], **changes)
    return config


def _strided_layout(tensors: list[Any], num_blocks: int) -> PlaneLayout:
    block_bytes = only_size("block size", {tensor.block_stride for tensor in tensors})
    plane_bytes = block_bytes * num_blocks
    for tensor in tensors:
        is_dense = len(tensor.layers) == 1 or tensor.layer_stride == plane_bytes
        if not is_dense or tensor.offset % plane_bytes:
            raise UnsupportedEngineError(
                "the KV layout puts a block's layers side by side; set VLLM_KV_CACHE_LAYOUT=LBNHC "
                "(or LBHNC)"
            )
    first_planes = tuple(tensor.offset // plane_bytes for tensor in tensors)
    ends = [plane + len(one.layers) for plane, one in zip(first_planes, tensors, strict=True)]
    return PlaneLayout(block_bytes, max(ends), first_planes, is_one_allocation=True)


def _separate_layout(tensors: list[Any], num_blocks: int) -> PlaneLayout:
    if any(getattr(tensor, "block_stride", 0) for tensor in tensors):
        raise UnsupportedEngineError("the KV layout packs a block's layers side by side")
    plane_bytes = only_size("plane size", {tensor.size for tensor in tensors})
    planes = tuple(range(len(tensors)))
    return PlaneLayout(plane_bytes // num_blocks, len(tensors), planes, is_one_allocation=False)
