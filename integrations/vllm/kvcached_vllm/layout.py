"""vLLM's plan for its KV cache in the words of our geometry, and back.

Two shapes of the plan exist and both are served here: up to 0.28 one tensor per plane
(`KVCacheTensor.shared_by`), from 0.29 on one allocation with a stride per layer
(`KVCacheTensor.layers`). Which one it is shows in the plan itself.
"""

import copy
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from kvcached_core.errors import UnsupportedEngineError
from kvcached_core.memory.geometry import Geometry
from kvcached_core.memory.seats import Placement
from kvcached_core.memory.size_classes import SizeClass


@dataclass(frozen=True)
class PlaneLayout:
    """The planes in a `KVCacheConfig`.

    Attributes:
        classes: The planes of each block size, the largest first. Cache groups that overlay each
            other share theirs.
        places: For each of the config's tensors, the plane of its first layer among those of its
            block size, and that size in bytes.
        is_one_allocation: Whether vLLM allocates all planes at once (from 0.29 on).
        is_side_by_side: Whether a block's layers lie side by side, in one plane for all of them.
    """

    classes: tuple[SizeClass, ...]
    places: tuple[tuple[int, int], ...]
    is_one_allocation: bool
    is_side_by_side: bool = False

    @property
    def bytes_of_block(self) -> int:
        """Bytes of one block in all planes."""
        return sum(each.bytes_of_all for each in self.classes)

    def num_planes(self, block_bytes: int) -> int:
        """Return how many planes have blocks of this size."""
        return sum(each.num_planes for each in self.classes if each.block_bytes == block_bytes)


_SPREAD = "the KV layout spreads a block over its layer; set VLLM_KV_CACHE_LAYOUT=LBNHC (or LBHNC)"
PLACEMENT = "kvcached_placement"  # as what a worker's `Placement` travels with its `KVCacheConfig`


def plane_layout(kv_cache_config: Any) -> PlaneLayout:
    """Return the planes of `kv_cache_config`.

    Raises:
        UnsupportedEngineError: If they are not dense, or overlay others of another block size.
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


def common_classes(layouts: Iterable[PlaneLayout]) -> tuple[SizeClass, ...]:
    """Return the planes of each block size that a rank may have, the largest size first."""
    layouts = list(layouts)
    sizes = {each.block_bytes for layout in layouts for each in layout.classes}
    return tuple(
        SizeClass(size, max(layout.num_planes(size) for layout in layouts))
        for size in sorted(sizes, reverse=True)
    )


def sparse_config(kv_cache_config: Any, layout: PlaneLayout, placement: Placement) -> Any:
    """Return a copy of the plan whose tensors lie in pages and are as long as the id space."""
    geometry, num_pages = placement.geometry, placement.num_pages
    config = copy.deepcopy(kv_cache_config)
    config.num_blocks = num_ids = geometry.num_ids(num_pages)
    if layout.is_side_by_side:  # where a layer lies in a block is as it was
        size = _bytes_of_all(layout, geometry, num_pages)
        config.kv_cache_tensors = [replace(one, size=size) for one in config.kv_cache_tensors]
        return config
    for index, (plane, size_class) in enumerate(tensor_planes(layout, geometry)):
        planes = geometry.classes[size_class]
        changes = {"size": num_ids * planes.block_bytes}
        if layout.is_one_allocation:
            changes = {
                "size": geometry.reserved_bytes(num_pages),
                "layer_stride": planes.run_bytes,
                "block_stride": planes.block_bytes,
                "offset": geometry.class_offset(size_class, num_pages) + planes.plane_offset(plane),
            }
        config.kv_cache_tensors[index] = replace(config.kv_cache_tensors[index], **changes)
    return config


def _bytes_of_all(layout: PlaneLayout, geometry: Geometry, num_pages: int) -> int:
    """Return the bytes of the allocation in which a block's layers lie side by side."""
    if layout.is_one_allocation:
        return geometry.reserved_bytes(num_pages)
    return geometry.num_ids(num_pages) * geometry.block_bytes


def tensor_planes(layout: PlaneLayout, geometry: Geometry) -> list[tuple[int, int]]:
    """Return the plane of each tensor's first layer in its size class, and which class that is.

    Where a block's layers lie side by side, vLLM allocates one tensor for all of them.
    """
    numbers = {each.block_bytes: number for number, each in enumerate(geometry.classes)}
    return [(plane, numbers[block_bytes]) for plane, block_bytes in layout.places]


def connector_config(sparse: Any, layout: PlaneLayout) -> Any:
    """Return the plan of `sparse_config` as a connector has to read it.

    A connector computes the bytes of a block: the memory of all layers, divided by the number of
    blocks. With one allocation for all layers that is a page's bytes by its ids, which is one
    layer's.
    """
    if not layout.is_one_allocation:
        return sparse
    config = copy.copy(sparse)
    size = sparse.num_blocks * layout.bytes_of_block
    config.kv_cache_tensors = [replace(tensor, size=size) for tensor in sparse.kv_cache_tensors]
    return config


def refuse_untried_copies(layouts: Iterable[PlaneLayout]) -> None:
    """Refuse layers beside a connector of which nobody has tried to copy the blocks.

    Where each layer has a tensor of its own, up to 0.28, these are layers that differ in block
    size, and those that lie side by side in a block.

    Raises:
        UnsupportedEngineError: If there are such layers.
    """
    for layout in layouts:
        if not layout.is_one_allocation and (layout.is_side_by_side or len(layout.classes) > 1):
            raise UnsupportedEngineError(
                "KV offloading of layers that differ in block size, or lie side by side in one: "
                "nobody has tried it before vLLM 0.29; remove --kv-offloading-size"
            )


def _strided_layout(tensors: list[Any], num_blocks: int) -> PlaneLayout:
    if any(_is_inside_a_block(tensor) for tensor in tensors):
        return _side_by_side(tensors, num_blocks, is_one_allocation=True)
    for tensor in tensors:
        plane_bytes = tensor.block_stride * num_blocks
        is_dense = len(tensor.layers) == 1 or tensor.layer_stride == plane_bytes
        if not is_dense:
            raise UnsupportedEngineError(_SPREAD)
    if len({tensor.block_stride for tensor in tensors}) > 1:
        ends = [one.offset + len(one.layers) * one.block_stride * num_blocks for one in tensors]
        if any(end > behind.offset for end, behind in zip(ends, tensors[1:], strict=False)):
            raise UnsupportedEngineError(
                "groups of layers that share memory differ in block size: set "
                "VLLM_KV_CACHE_LAYOUT=BLHNC, or --disable-hybrid-kv-cache-manager"
            )
        sizes = [(tensor.block_stride, len(tensor.layers)) for tensor in tensors]
        return _one_behind_the_other(sizes, is_one_allocation=True)
    block_bytes = tensors[0].block_stride
    plane_bytes = block_bytes * num_blocks
    if any(tensor.offset % plane_bytes for tensor in tensors):
        raise UnsupportedEngineError(_SPREAD)
    first_planes = [tensor.offset // plane_bytes for tensor in tensors]
    ends = [plane + len(one.layers) for plane, one in zip(first_planes, tensors, strict=True)]
    places = tuple((plane, block_bytes) for plane in first_planes)
    return PlaneLayout((SizeClass(block_bytes, max(ends)),), places, is_one_allocation=True)


def _separate_layout(tensors: list[Any], num_blocks: int) -> PlaneLayout:
    if any(getattr(tensor, "block_stride", 0) for tensor in tensors):
        return _side_by_side(tensors, num_blocks, is_one_allocation=False)
    sizes = [(tensor.size // num_blocks, 1) for tensor in tensors]
    return _one_behind_the_other(sizes, is_one_allocation=False)


def _is_inside_a_block(tensor: Any) -> bool:
    """Return whether other layers of the same block lie before or behind one of these."""
    is_followed = len(tensor.layers) > 1 and tensor.layer_stride < tensor.block_stride
    return is_followed or 0 < tensor.offset < tensor.block_stride


def _side_by_side(tensors: list[Any], num_blocks: int, *, is_one_allocation: bool) -> PlaneLayout:
    """Return the layout of blocks that hold what all layers have of them."""
    strides = {tensor.block_stride for tensor in tensors}
    if {tensor.size for tensor in tensors} != {stride * num_blocks for stride in strides}:
        raise UnsupportedEngineError(_SPREAD)
    (block_bytes,) = strides
    classes, places = (SizeClass(block_bytes, 1),), ((0, block_bytes),)
    return PlaneLayout(classes, places, is_one_allocation, is_side_by_side=True)


def _one_behind_the_other(sizes: list[tuple[int, int]], *, is_one_allocation: bool) -> PlaneLayout:
    """Return the layout of tensors of a block size and a number of layers each, none shared."""
    numbers: Counter[int] = Counter()
    places = []
    for block_bytes, num_layers in sizes:
        places.append((numbers[block_bytes], block_bytes))
        numbers[block_bytes] += num_layers
    classes = tuple(SizeClass(size, numbers[size]) for size in sorted(numbers, reverse=True))
    return PlaneLayout(classes, tuple(places), is_one_allocation)
