"""Layers whose blocks differ in size: one range of addresses for each size, the same ids in all.

The planes of one block size are a size class. A page has one handle in each class, and it is mapped
in all of them or in none:

    class c has n planes of blocks of B bytes; its range begins behind those of the classes before
    page k  at k * ids_per_page * B inside the range
    run l   at l * blocks_per_page * B inside the page, block i at i * B inside the run

So in each class a plane is dense, with the stride B, and a block has one id in all of them. A
handle holds the n runs and no more: what is left of `ids_per_page * B` are addresses alone. The
classes need not have as many planes as each other, and no block has to be padded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd, lcm

from kvcached_core.errors import GeometryError
from kvcached_core.memory.geometry import MAX_WASTE, Geometry, choose_geometry
from kvcached_core.units import DEFAULT_PAGE_BYTES


@dataclass(frozen=True)
class SizeClass:
    """The planes of one block size.

    Attributes:
        block_bytes: Bytes of one block in one plane.
        num_planes: Planes; the most that a rank has, where ranks differ.
    """

    block_bytes: int
    num_planes: int

    @property
    def bytes_of_all(self) -> int:
        """Bytes of one block in all of these planes."""
        return self.block_bytes * self.num_planes


@dataclass(frozen=True)
class MixedGeometry(Geometry):
    """How the blocks of a pool with several size classes lie in pages.

    Its own fields, and where its planes lie, are those of the first class. `classes` has all.

    Attributes:
        others: The geometries of the other classes.
        handle_bytes: Bytes of a page's handle in each class, the same on all ranks.
    """

    others: tuple[Geometry, ...]
    handle_bytes: tuple[int, ...]

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, over all classes."""
        return sum(self.handle_bytes)

    @property
    def waste(self) -> float:
        """The share of a page that no block uses."""
        used_bytes = sum(each.num_planes * each.run_bytes for each in self.classes)
        return 1 - used_bytes / self.page_bytes

    @property
    def classes(self) -> tuple[Geometry, ...]:
        """The geometry of each class."""
        first = Geometry(self.block_bytes, self.num_planes, self.ids_per_page, self.blocks_per_page)
        return (first, *self.others)

    @property
    def maps_gaps(self) -> bool:
        """An id that does not exist may lie behind the end of a handle, where nothing is mapped."""
        return False

    def reserved_bytes(self, num_pages: int) -> int:
        """Return the addresses that `num_pages` pages take, in bytes."""
        return sum(each.reserved_bytes(num_pages) for each in self.classes)

    def class_offset(self, size_class: int, num_pages: int) -> int:
        """Return where a class begins, in bytes behind the start of the reservation."""
        return sum(each.reserved_bytes(num_pages) for each in self.classes[:size_class])


def choose_any(
    classes: Sequence[SizeClass],
    *,
    granularity_bytes: int,
    target_page_bytes: int = DEFAULT_PAGE_BYTES,
) -> Geometry:
    """Return the geometry of a pool with these size classes, one or more.

    A page's handles are multiples of the granularity. As with one class, a size that wastes nothing
    is taken if one lies between half and twice the target; otherwise the smallest size from half
    the target on that wastes less than 3 %.

    Raises:
        GeometryError: If a size is not positive, or there is no class.
    """
    sizes = {"granularity_bytes": granularity_bytes, "target_page_bytes": target_page_bytes}
    if len(classes) == 1:
        (only,) = classes
        chosen = choose_geometry(block_bytes=only.block_bytes, num_planes=only.num_planes, **sizes)
        # A page of one plane is whole blocks and whole granules, which may have to be many.
        if only.num_planes > 1 or chosen.page_bytes <= 2 * target_page_bytes:
            return chosen
    if not classes or min(*sizes.values(), *(each.bytes_of_all for each in classes)) <= 0:
        raise GeometryError(f"{list(classes)}, {sizes}: every size and number must be positive")
    num_blocks = _choose_blocks(classes, granularity_bytes, target_page_bytes)
    step = lcm(*(granularity_bytes // gcd(granularity_bytes, one.block_bytes) for one in classes))
    ids = _round_up(num_blocks * max(each.num_planes for each in classes), step)
    first, *others = (
        Geometry(each.block_bytes, each.num_planes, ids, num_blocks) for each in classes
    )
    return MixedGeometry(
        first.block_bytes,
        first.num_planes,
        ids,
        num_blocks,
        tuple(others),
        _handle_bytes(classes, num_blocks, granularity_bytes),
    )


def _choose_blocks(
    classes: Sequence[SizeClass], granularity_bytes: int, target_page_bytes: int
) -> int:
    """Return how many blocks a page shall have."""
    block_bytes = sum(each.bytes_of_all for each in classes)

    def waste(num_blocks: int) -> float:
        return 1 - num_blocks * block_bytes / sum(
            _handle_bytes(classes, num_blocks, granularity_bytes)
        )

    # Every handle is full with so many blocks, and with their multiples.
    exact_step = lcm(
        *(granularity_bytes // gcd(granularity_bytes, each.bytes_of_all) for each in classes)
    )
    target_blocks = max(target_page_bytes // block_bytes, 1)
    exact = exact_step * max(round(target_blocks / exact_step), 1)
    if exact <= 2 * target_blocks:
        return exact
    num_blocks = max(-(-target_blocks // 2), 1)
    while waste(num_blocks) >= MAX_WASTE:
        num_blocks += 1
    return num_blocks


def _handle_bytes(
    classes: Sequence[SizeClass], num_blocks: int, granularity_bytes: int
) -> tuple[int, ...]:
    return tuple(_round_up(num_blocks * each.bytes_of_all, granularity_bytes) for each in classes)


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
