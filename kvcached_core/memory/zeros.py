"""Handing our addresses to an engine where it asks torch for a zeroed KV cache as bytes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from kvcached_core.errors import UnsupportedEngineError
from kvcached_core.memory.arena import Arena
from kvcached_core.memory.asked_tensors import AskedTensors


class ZerosFromArena(AskedTensors):
    """While active, `torch.zeros(n, dtype=torch.int8)` returns our tensor of `n` bytes.

    A real `torch.zeros` would touch, and so need, the whole virtual size.

    Args:
        tensors: What to hand out, in this order.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self._tensors = list(tensors)

    @property
    def num_left(self) -> int:
        """Tensors that nobody asked for."""
        return len(self._tensors)

    def answer(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> torch.Tensor | None:
        """See `AskedTensors`."""
        if function is torch.zeros and self._tensors and kwargs.get("dtype") is torch.int8:
            size = args[0] if args else kwargs.get("size")
            if size in (self._tensors[0].numel(), (self._tensors[0].numel(),)):
                return self._tensors.pop(0)
        return None


@contextmanager
def zeros_from(arena: Arena, planes: Sequence[tuple[int, int]] | None = None) -> Iterator[None]:
    """Let an engine that allocates its KV cache inside get the addresses of an arena.

    Args:
        arena: The arena.
        planes: The planes that the engine asks for in turn, each with its number in a size class
            and that of the class; None if it asks for all at once.

    Raises:
        UnsupportedEngineError: If it did not ask for all of them.
    """
    if planes is None:
        tensors = [arena.tensor()]
    else:
        tensors = [arena.plane_tensor(plane, size_class) for plane, size_class in planes]
    with ZerosFromArena(tensors) as zeros:
        yield
    if zeros.num_left:
        raise UnsupportedEngineError(
            f"the engine allocated {len(tensors) - zeros.num_left} KV tensors, not {len(tensors)}"
        )
