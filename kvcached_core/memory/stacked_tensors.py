"""Tensors in which an engine has the planes of all layers, on our arena: [layers, blocks, ...]."""

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch

from kvcached_core.memory.arena import Arena
from kvcached_core.memory.asked_tensors import AskedTensors
from kvcached_core.memory.geometry import Geometry
from kvcached_core.memory.plane_places import PlanePlaces


class MakeStacks(AskedTensors):
    """While it is active, `torch.zeros` of a tensor with so many blocks goes to `make`.

    Everything else, and a tensor in which a block takes nothing, is made as always.
    """

    def __init__(
        self, num_blocks: int, make: Callable[[tuple[int, ...], torch.dtype], torch.Tensor]
    ) -> None:
        super().__init__()
        self._num_blocks = num_blocks
        self._make = make

    def answer(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> torch.Tensor | None:
        """See `AskedTensors`."""
        if function is torch.zeros:
            given = kwargs.get("size", args[0] if len(args) == 1 else args)
            shape = tuple(given) if isinstance(given, tuple | list | torch.Size) else (given,)
            if shape[1:2] == (self._num_blocks,) and prod(shape):
                return self._make(shape, kwargs["dtype"])
        return None


def lay_out(create_buffers: Callable[[], None], geometry: Geometry, arena: Arena) -> None:
    """Let `create_buffers` make tensors of all layers, each as long as the id space, in the arena.

    In each layer they are dense planes. Where several have blocks of one size, their planes follow
    one another.

    Args:
        create_buffers: What makes them.
        geometry: How blocks lie in pages.
        arena: Where they lie.

    Raises:
        UnsupportedEngineError: If the planes that it makes are not those of the geometry.
    """
    whole, places = arena.tensor(), PlanePlaces(geometry, arena)

    def place(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        offset, planes = places.place(prod(shape[2:]) * dtype.itemsize, shape[0])
        strides = [prod(shape[index + 1 :]) for index in range(1, len(shape))]
        strides.insert(0, planes.run_bytes // dtype.itemsize)
        return whole.view(dtype).as_strided(shape, strides, offset // dtype.itemsize)

    with MakeStacks(geometry.num_ids(arena.num_pages), place):
        create_buffers()
    places.check({each.block_bytes: each.num_planes for each in geometry.classes})
