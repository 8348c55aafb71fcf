"""Where each of a rank's parameters lies in its image: arithmetic, without side effects.

The parameters lie one behind the other in the order in which a step reads them, so the last pages
hold the last layers. Pages are cut through them wherever they end.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from kvcached_core.errors import GeometryError
from kvcached_core.units import MIB

# What kernels ask of a parameter's address; the strictest of them asks for 128 bytes.
ALIGNMENT_BYTES = 512
# A handle costs the driver about the same whatever its size, and one of more than this is no faster
# to copy to; fewer than these pages, and giving a page gives a large part of the model.
MAX_PAGE_BYTES = 64 * MIB
NUM_PAGES_WANTED = 32


@dataclass(frozen=True)
class Piece:
    """A parameter in the image.

    Attributes:
        name: What the model calls it.
        offset_bytes: Where it begins, behind the image's start.
        num_bytes: Its length.
    """

    name: str
    offset_bytes: int
    num_bytes: int

    @property
    def end_bytes(self) -> int:
        """The first byte behind it."""
        return self.offset_bytes + self.num_bytes


@dataclass(frozen=True)
class Layout:
    """All parameters of a rank, and the pages that hold them.

    Attributes:
        pieces: The parameters, in the order of their addresses.
        page_bytes: Bytes of a page.
        num_pages: Pages of the image.
    """

    pieces: tuple[Piece, ...]
    page_bytes: int
    num_pages: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the image: whole pages."""
        return self.num_pages * self.page_bytes

    @property
    def digest(self) -> str:
        """A short name of this layout; another one has another."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:32]

    def to_json(self) -> str:
        """Return it as text; the same layout is always the same text."""
        pieces = [[piece.name, piece.offset_bytes, piece.num_bytes] for piece in self.pieces]
        found = {"page_bytes": self.page_bytes, "num_pages": self.num_pages, "pieces": pieces}
        return json.dumps(found, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Layout":
        """Return the layout that `to_json` wrote.

        Raises:
            GeometryError: If the text is something else.
        """
        try:
            found = json.loads(text)
            pieces = tuple(
                Piece(str(name), int(offset_bytes), int(num_bytes))
                for name, offset_bytes, num_bytes in found["pieces"]
            )
            return cls(pieces, int(found["page_bytes"]), int(found["num_pages"]))
        except (ValueError, TypeError, KeyError) as error:
            raise GeometryError(f"this is no layout of weights: {error}") from error


def lay_out(sizes: Sequence[tuple[str, int]], granularity_bytes: int) -> Layout:
    """Return the layout of parameters.

    A page is the granularity times the power of two that makes the image about 32 pages or, where
    these would be more than 64 MiB each, as many pages of 64 MiB as it needs.

    Args:
        sizes: Names and sizes in bytes, in the order in which a step reads them.
        granularity_bytes: The backend's smallest page.

    Raises:
        GeometryError: If there is nothing, a size is not positive, or a name comes twice.
    """
    if len({name for name, _ in sizes}) != len(sizes):
        names = [name for name, _ in sizes]
        twice = next(name for name in names if names.count(name) > 1)
        raise GeometryError(f"the parameter {twice!r} comes twice; allowed is once")
    pieces: list[Piece] = []
    end_bytes = 0
    for name, num_bytes in sizes:
        if num_bytes <= 0:
            raise GeometryError(f"the parameter {name!r} has {num_bytes} bytes, allowed are 1 on")
        pieces.append(Piece(name, -(-end_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES, num_bytes))
        end_bytes = pieces[-1].end_bytes
    if not pieces:
        raise GeometryError("an image of weights needs a parameter; there are 0")
    page_bytes = choose_page_bytes(end_bytes, granularity_bytes)
    return Layout(tuple(pieces), page_bytes, -(-end_bytes // page_bytes))


def choose_page_bytes(num_bytes: int, granularity_bytes: int) -> int:
    """Return the size of a page for an image of `num_bytes`.

    Raises:
        GeometryError: If the granularity is not positive.
    """
    if granularity_bytes <= 0:
        raise GeometryError(f"granularity_bytes={granularity_bytes} must be positive")
    page_bytes = granularity_bytes
    while page_bytes * NUM_PAGES_WANTED < num_bytes and 2 * page_bytes <= MAX_PAGE_BYTES:
        page_bytes *= 2
    return page_bytes
