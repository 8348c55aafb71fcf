"""The tensors that an engine makes for its layers, on our arena: they become planes of pages."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from kvcached_core.errors import UnsupportedEngineError
from kvcached_core.memory.arena import Arena
from kvcached_core.memory.asked_tensors import AskedTensors
from kvcached_core.memory.geometry import Geometry
from kvcached_core.memory.plane_places import PlanePlaces
from kvcached_core.memory.size_classes import SizeClass


@dataclass(frozen=True)
class PoolShape:
    """The planes that a KV pool will make.

    Attributes:
        num_planes: Tensors, one for each layer, or two where K and V are apart.
        num_rows: Tokens that each has room for, the padding block included.
        row_bytes: Bytes of a token in one plane.
        block_tokens: Tokens of a block.
        others: The planes of other block sizes.
    """

    num_planes: int
    num_rows: int
    row_bytes: int
    block_tokens: int
    others: tuple[SizeClass, ...] = ()

    @property
    def block_bytes(self) -> int:
        """Bytes of a block in one plane."""
        return self.row_bytes * self.block_tokens

    @property
    def classes(self) -> tuple[SizeClass, ...]:
        """The planes of each block size."""
        return (SizeClass(self.block_bytes, self.num_planes), *self.others)

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
        row_tokens: Tokens of a row: 1, or a block's where a pool has a row for each block.
    """

    num_planes: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    row_tokens: int = 1

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in one plane."""
        return prod(self.shape[self.num_planes :]) * self.dtype.itemsize

    def block_bytes(self, block_tokens: int) -> int:
        """Return the bytes of a block of so many tokens in one plane."""
        return self.row_bytes * block_tokens // self.row_tokens


class MakePlanes(AskedTensors):
    """While it is active, `torch.zeros` and `torch.empty` of a pool's planes go to `make`.

    A plane has a row for each token, or for each block. Everything else, and a tensor of another
    number of rows, is made as always.
    """

    def __init__(
        self, num_rows: int, block_tokens: int, make: Callable[[WantedPlanes], torch.Tensor]
    ) -> None:
        super().__init__()
        self._num_rows = num_rows
        self._block_tokens = block_tokens
        self._make = make

    def answer(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> torch.Tensor | None:
        """See `AskedTensors`."""
        if function in (torch.zeros, torch.empty) and args:
            wanted = self._wanted(args, kwargs.get("dtype"))
            if wanted is not None:
                return self._make(wanted)
        return None

    def _wanted(self, args: Any, dtype: torch.dtype | None) -> WantedPlanes | None:
        shape = tuple(args[0]) if isinstance(args[0], tuple | list | torch.Size) else tuple(args)
        if dtype is None:
            return None
        if len(shape) > 1 and shape[0] * self._block_tokens == self._num_rows:
            return WantedPlanes(1, shape, dtype, row_tokens=self._block_tokens)
        if len(shape) > 1 and shape[0] == self._num_rows:
            return WantedPlanes(1, shape, dtype)
        if len(shape) > 2 and shape[0] == 2:  # noqa: PLR2004  K and V
            for row_tokens in {1, self._block_tokens}:
                if shape[1] * row_tokens == self._num_rows:
                    return WantedPlanes(2, shape, dtype, row_tokens)
        return None


def measure(
    create_buffers: Callable[[], None], rows_per_plane: int, block_tokens: int
) -> PoolShape:
    """Return what planes `create_buffers` makes, by letting it make them of nothing.

    Raises:
        UnsupportedEngineError: If there are none.
    """
    numbers: Counter[int] = Counter()

    def count(wanted: WantedPlanes) -> torch.Tensor:
        numbers[wanted.block_bytes(block_tokens)] += wanted.num_planes
        return torch.empty(wanted.shape, dtype=wanted.dtype, device="meta")

    with MakePlanes(rows_per_plane, block_tokens, count):
        create_buffers()
    if not numbers:
        raise UnsupportedEngineError("the pool made no planes, expected keys and values")
    first, *others = (SizeClass(size, numbers[size]) for size in sorted(numbers, reverse=True))
    row_bytes = first.block_bytes // block_tokens
    return PoolShape(first.num_planes, rows_per_plane, row_bytes, block_tokens, tuple(others))


def num_rows(shape: PoolShape, geometry: Geometry, num_pages: int) -> int:
    """Return the tokens of the id space: how long each plane has to be."""
    return geometry.num_ids(num_pages) * shape.block_tokens


def lay_out(
    create_buffers: Callable[[], None],
    shape: PoolShape,
    geometry: Geometry,
    arena: Arena,
    first_plane: int = 0,
) -> None:
    """Let `create_buffers` make its planes, each as long as the id space, in the arena.

    Args:
        create_buffers: What makes them.
        shape: What it makes: its own planes, of which the arena may have more.
        geometry: How blocks lie in pages.
        arena: Where they lie.
        first_plane: The number of the first one; of another than the first size there are no more.

    Raises:
        UnsupportedEngineError: If it makes another number of planes.
    """
    whole = arena.tensor()
    places = PlanePlaces(geometry, arena, {shape.block_bytes: first_plane})

    def place(wanted: WantedPlanes) -> torch.Tensor:
        itemsize, block_bytes = wanted.dtype.itemsize, wanted.block_bytes(shape.block_tokens)
        offset, planes = places.place(block_bytes, wanted.num_planes)
        rows = wanted.shape[wanted.num_planes - 1 :]
        strides = [prod(rows[index + 1 :]) for index in range(len(rows))]
        if wanted.num_planes > 1:
            strides.insert(0, planes.run_bytes // itemsize)
        return whole.view(wanted.dtype).as_strided(wanted.shape, strides, offset // itemsize)

    with MakePlanes(num_rows(shape, geometry, arena.num_pages), shape.block_tokens, place):
        create_buffers()
    expected = Counter({each.block_bytes: each.num_planes for each in shape.classes})
    expected[shape.block_bytes] += first_plane
    places.check(expected)
