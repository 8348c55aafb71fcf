"""Tensors in which an engine has the planes of all layers, on our arena: [layers, blocks, ...]."""

from collections import Counter
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from kvcached_core.errors import UnsupportedEngineError
from kvcached_core.memory.arena import Arena
from kvcached_core.memory.geometry import Geometry


class MakeStacks(TorchFunctionMode):
    """While it is active, `torch.zeros` of a tensor with so many blocks goes to `make`.

    Everything else, and a tensor in which a block takes nothing, is made as always.
    """

    def __init__(
        self, num_blocks: int, make: Callable[[tuple[int, ...], torch.dtype], torch.Tensor]
    ) -> None:
        super().__init__()
        self._num_blocks = num_blocks
        self._make = make

    def __torch_function__(
        self,
        function: Any,
        types: Any,
        args: Any = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """See `TorchFunctionMode`."""
        del types
        kwargs = dict(kwargs or {})
        if function is torch.zeros:
            given = kwargs.get("size", args[0] if len(args) == 1 else args)
            shape = tuple(given) if isinstance(given, tuple | list | torch.Size) else (given,)
            if shape[1:2] == (self._num_blocks,) and prod(shape):
                return self._make(shape, kwargs["dtype"])
        return function(*args, **kwargs)


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
    whole, placed = arena.tensor(), Counter[int]()
    numbers = {each.block_bytes: number for number, each in enumerate(geometry.classes)}

    def place(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        block_bytes = prod(shape[2:]) * dtype.itemsize
        if block_bytes not in numbers:
            raise UnsupportedEngineError(
                f"a tensor of blocks of {block_bytes} bytes was made, expected one of "
                f"{sorted(numbers)}"
            )
        planes = geometry.classes[numbers[block_bytes]]
        offset = geometry.class_offset(numbers[block_bytes], arena.num_pages)
        offset += planes.plane_offset(placed[block_bytes])
        placed[block_bytes] += shape[0]
        strides = [prod(shape[index + 1 :]) for index in range(1, len(shape))]
        strides.insert(0, planes.run_bytes // dtype.itemsize)
        return whole.view(dtype).as_strided(shape, strides, offset // dtype.itemsize)

    with MakeStacks(geometry.num_ids(arena.num_pages), place):
        create_buffers()
    expected = Counter({each.block_bytes: each.num_planes for each in geometry.classes})
    if placed != expected:
        raise UnsupportedEngineError(
            f"planes up to {dict(placed)} were made, expected {dict(expected)}, by the bytes of a "
            "block"
        )
