"""The tensors that an engine makes for its layers, on our arena: they become planes of pages."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from kvcached_core.errors import UnsupportedEngineError
from kvcached_core.memory.arena import Arena
from kvcached_core.memory.geometry import Geometry, only_size


@dataclass(frozen=True)
class PoolShape:
    """The planes that a KV pool will make.

    Attributes:
        num_planes: Tensors, one for each layer, or two where K and V are apart.
        num_rows: Tokens that each has room for, the padding block included.
        row_bytes: Bytes of a token in one plane.
        block_tokens: Tokens of a block.
    """

    num_planes: int
    num_rows: int
    row_bytes: int
    block_tokens: int

    @property
    def block_bytes(self) -> int:
        """Bytes of a block in one plane."""
        return self.row_bytes * self.block_tokens

    @property
    def num_blocks(self) -> int:
        """Blocks of the pool, the padding block included."""
        return -(-self.num_rows // self.block_tokens)


@dataclass(frozen=True)
class WantedPlanes:
    """A tensor that a pool makes: one plane, or keys and values of a layer one behind the other.

    Attributes:
        num_planes: 1, or 2 with a first dimension of 2.
        shape: The tensor's shape.
        dtype: Its type.
    """

    num_planes: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of a token in one plane."""
        return prod(self.shape[self.num_planes :]) * self.dtype.itemsize


class MakePlanes(TorchFunctionMode):
    """While it is active, `torch.zeros` and `torch.empty` of a pool's planes go to `make`.

    Everything else, and a tensor of another number of rows, is made as always.
    """

    def __init__(self, num_rows: int, make: Callable[[WantedPlanes], torch.Tensor]) -> None:
        super().__init__()
        self._num_rows = num_rows
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
        if function in (torch.zeros, torch.empty) and args:
            wanted = self._wanted(args, kwargs.get("dtype"))
            if wanted is not None:
                return self._make(wanted)
        return function(*args, **kwargs)

    def _wanted(self, args: Any, dtype: torch.dtype | None) -> WantedPlanes | None:
        shape = tuple(args[0]) if isinstance(args[0], tuple | list | torch.Size) else tuple(args)
        if dtype is None or self._num_rows not in shape[:2]:
            return None
        if shape[0] == self._num_rows and len(shape) > 1:
            return WantedPlanes(1, shape, dtype)
        return WantedPlanes(2, shape, dtype) if shape[0] == 2 else None  # noqa: PLR2004  K and V


def measure(
    create_buffers: Callable[[], None], rows_per_plane: int, block_tokens: int
) -> PoolShape:
    """Return what planes `create_buffers` makes, by letting it make them of nothing.

    Raises:
        UnsupportedEngineError: If they differ in size, or there are none.
    """
    rows: list[int] = []

    def count(wanted: WantedPlanes) -> torch.Tensor:
        rows.extend([wanted.row_bytes] * wanted.num_planes)
        return torch.empty(wanted.shape, dtype=wanted.dtype, device="meta")

    with MakePlanes(rows_per_plane, count):
        create_buffers()
    row_bytes = only_size("size of a token", rows)
    return PoolShape(len(rows), rows_per_plane, row_bytes, block_tokens)


def num_rows(shape: PoolShape, geometry: Geometry, num_pages: int) -> int:
    """Return the tokens of the id space: how long each plane has to be."""
    return geometry.num_ids(num_pages) * shape.block_tokens


def lay_out(
    create_buffers: Callable[[], None], shape: PoolShape, geometry: Geometry, arena: Arena
) -> None:
    """Let `create_buffers` make its planes, each as long as the id space, in the arena."""
    whole, placed = arena.tensor(), 0

    def place(wanted: WantedPlanes) -> torch.Tensor:
        nonlocal placed
        itemsize = wanted.dtype.itemsize
        offset = geometry.plane_offset(placed) // itemsize
        placed += wanted.num_planes
        rows = wanted.shape[wanted.num_planes - 1 :]
        strides = [prod(rows[index + 1 :]) for index in range(len(rows))]
        if wanted.num_planes > 1:
            strides.insert(0, geometry.run_bytes // itemsize)
        return whole.view(wanted.dtype).as_strided(wanted.shape, strides, offset)

    with MakePlanes(num_rows(shape, geometry, arena.num_pages), place):
        create_buffers()
    if placed != shape.num_planes:
        raise UnsupportedEngineError(f"{placed} planes were made, expected {shape.num_planes}")
