"""Where the planes that an engine makes lie in our arena: one behind the other, by their size."""

from collections import Counter
from collections.abc import Mapping

from kvcached_core.errors import UnsupportedEngineError
from kvcached_core.memory.arena import Arena
from kvcached_core.memory.geometry import Geometry


class PlanePlaces:
    """Gives the planes of each block size the places of the geometry, in the order they are made.

    Args:
        geometry: How blocks lie in pages.
        arena: Where they lie.
        placed: Planes that have their places already, by the bytes of a block.
    """

    def __init__(
        self, geometry: Geometry, arena: Arena, placed: Mapping[int, int] | None = None
    ) -> None:
        self._geometry, self._num_pages = geometry, arena.num_pages
        self._numbers = {each.block_bytes: number for number, each in enumerate(geometry.classes)}
        self._placed = Counter(placed)

    def place(self, block_bytes: int, num_planes: int) -> tuple[int, Geometry]:
        """Return where the next planes of a block size begin, in bytes, and how they lie.

        Raises:
            UnsupportedEngineError: If the geometry has no blocks of that size.
        """
        number = self._numbers.get(block_bytes)
        if number is None:
            raise UnsupportedEngineError(
                f"a tensor of blocks of {block_bytes} bytes was made, expected one of "
                f"{sorted(self._numbers)}"
            )
        planes = self._geometry.classes[number]
        offset = self._geometry.class_offset(number, self._num_pages)
        offset += planes.plane_offset(self._placed[block_bytes])
        self._placed[block_bytes] += num_planes
        return offset, planes

    def check(self, expected: Mapping[int, int]) -> None:
        """See that so many planes of each block size have their places.

        Raises:
            UnsupportedEngineError: If it is another number.
        """
        if self._placed != Counter(expected):
            raise UnsupportedEngineError(
                f"planes up to {dict(self._placed)} were made, expected {dict(expected)}, by the "
                "bytes of a block"
            )
