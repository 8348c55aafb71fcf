"""Planes, pages and sparse block ids: the arithmetic of the address space, without side effects.

A pool has `num_planes` planes (one per layer, or two where K and V lie apart), and each holds
`block_bytes` for every block. A page is one physical handle that backs `blocks_per_page` blocks in
all planes. It spans `ids_per_page` block ids, of which only the first `blocks_per_page` exist:

    page k  at k * page_bytes, where page_bytes = ids_per_page * block_bytes
    run l   at l * blocks_per_page * block_bytes inside it: plane l's blocks, contiguous
    block i at i * block_bytes inside that run

So block id `k * ids_per_page + i` lies `id * block_bytes` behind the plane's own base: every plane
is an ordinary dense tensor with the block stride that the engine's kernels always had.

Planes of several block sizes: see `size_classes`.
"""

from dataclasses import dataclass
from math import gcd

from kvcached_core.errors import GeometryError
from kvcached_core.units import DEFAULT_PAGE_BYTES

MAX_WASTE = 0.03
MAX_ID = 2**31


@dataclass(frozen=True)
class Geometry:
    """How the blocks of one pool lie in pages.

    Attributes:
        block_bytes: Bytes of one block in one plane.
        num_planes: Planes of the pool.
        ids_per_page: Consecutive block ids that one page spans.
        blocks_per_page: How many of these ids exist: the first ones.
    """

    block_bytes: int
    num_planes: int
    ids_per_page: int
    blocks_per_page: int

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, over all planes."""
        return self.ids_per_page * self.block_bytes

    @property
    def run_bytes(self) -> int:
        """Bytes of one plane inside one page; also the distance between two planes' bases."""
        return self.blocks_per_page * self.block_bytes

    @property
    def waste(self) -> float:
        """The share of a page that no block uses."""
        return 1 - self.num_planes * self.blocks_per_page / self.ids_per_page

    @property
    def classes(self) -> "tuple[Geometry, ...]":
        """The geometry of each size class: ids and blocks of a page are the same in all."""
        return (self,)

    @property
    def maps_gaps(self) -> bool:
        """Whether an id that does not exist is mapped together with the pages that it touches."""
        return True

    def reserved_bytes(self, num_pages: int) -> int:
        """Return the addresses that `num_pages` pages take, in bytes."""
        return num_pages * self.page_bytes

    def class_offset(self, size_class: int, num_pages: int) -> int:  # noqa: ARG002  there is one
        """Return where a size class begins, in bytes behind the start of the reservation."""
        return 0

    def num_ids(self, num_pages: int) -> int:
        """Return the length of the id space of `num_pages` pages: a plane's tensor has it."""
        return (num_pages - 1) * self.ids_per_page + self.blocks_per_page

    def block_id(self, block: int) -> int:
        """Return the sparse id of the `block`-th existing block."""
        page, index = divmod(block, self.blocks_per_page)
        return page * self.ids_per_page + index

    def page_of(self, block_id: int) -> int:
        """Return the page that backs `block_id`."""
        return block_id // self.ids_per_page

    def exists(self, block_id: int) -> bool:
        """Return whether `block_id` names a block, not a gap between two pages' blocks."""
        return block_id >= 0 and block_id % self.ids_per_page < self.blocks_per_page

    def pages_touched(self, block_id: int) -> tuple[int, ...]:
        """Return the pages that an access to `block_id` reaches in any plane.

        One for an id that exists. An id in the gap reaches its own page or the next one, depending
        on the plane; engines use such ids only while they warm up.
        """
        page = self.page_of(block_id)
        return (page,) if self.exists(block_id) else (page, page + 1)

    def plane_offset(self, plane: int) -> int:
        """Return where `plane` starts, in bytes behind the start of the reservation."""
        return plane * self.run_bytes

    def block_offset(self, plane: int, block_id: int) -> int:
        """Return where `block_id` lies in `plane`, in bytes behind the start of the reservation."""
        return self.plane_offset(plane) + block_id * self.block_bytes

    def check_ids(self, num_pages: int) -> None:
        """Refuse a pool whose ids would leave the 31 bits that engines' kernels give them.

        Raises:
            GeometryError: If `num_pages` pages need an id of 2^31 or more.
        """
        if self.num_ids(num_pages) > MAX_ID:
            raise GeometryError(
                f"{num_pages} pages of {self.page_bytes} bytes need block ids up to "
                f"{self.num_ids(num_pages)}, allowed are ids below {MAX_ID}; "
                "lower the limit or raise the engine's block size"
            )


def choose_geometry(
    *,
    block_bytes: int,
    num_planes: int,
    granularity_bytes: int,
    target_page_bytes: int = DEFAULT_PAGE_BYTES,
) -> Geometry:
    """Return the geometry whose page is nearest to the target without wasting memory.

    A page must be a multiple of the granularity and hold at least one block. A size that wastes
    nothing is taken if one lies between half and twice the target; otherwise the smallest size from
    half the target on that wastes less than 3 %.

    Raises:
        GeometryError: If an argument is not positive.
    """
    for name, value in (
        ("block_bytes", block_bytes),
        ("num_planes", num_planes),
        ("granularity_bytes", granularity_bytes),
        ("target_page_bytes", target_page_bytes),
    ):
        if value <= 0:
            raise GeometryError(f"{name}={value} must be positive")
    step = granularity_bytes // gcd(granularity_bytes, block_bytes)
    target_ids = max(target_page_bytes // block_bytes, 1)
    exact_step = step * num_planes // gcd(step, num_planes)
    exact = exact_step * max(round(target_ids / exact_step), 1)
    if exact <= 2 * target_ids:  # it is never less than half of it
        ids = exact
    else:
        ids = step * max(-(-target_ids // (2 * step)), -(-num_planes // step))
        while ids % num_planes >= MAX_WASTE * ids:
            ids += step
    return Geometry(block_bytes, num_planes, ids, ids // num_planes)


def fit_geometry(*, block_bytes: int, num_planes: int, page_bytes: int) -> Geometry:
    """Return the geometry of a second pool whose pages are those of a first one.

    Raises:
        GeometryError: If no whole number of blocks is as large as a page, or too much of it would
            be wasted.
    """
    ids, rest = divmod(page_bytes, block_bytes)
    if rest or ids % num_planes >= MAX_WASTE * ids:
        raise GeometryError(
            f"pages of {page_bytes} bytes do not fit {num_planes} planes of blocks of "
            f"{block_bytes} bytes; a block has to divide a page, of which less than "
            f"{MAX_WASTE:.0%} may be left"
        )
    return Geometry(block_bytes, num_planes, ids, ids // num_planes)
