"""How much of an engine's weights is there, as a worker says it and a scheduler goes by it."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class WeightStatus:
    """The weight pages of a rank, or of ranks that give and take the same; they are always a run.

    Attributes:
        num_pages: Pages of all weights.
        num_resident_pages: How many of them are there, from the first one on.
        page_bytes: Bytes of a page.
        is_copied: Whether host memory has all of them, so that pages may be dropped.
        of_ranks: The same of each rank, in the order of ranks; empty where it is one rank's.
    """

    num_pages: int
    num_resident_pages: int
    page_bytes: int
    is_copied: bool
    of_ranks: tuple["WeightStatus", ...] = ()

    @property
    def num_missing_pages(self) -> int:
        """Pages that have to come before a step may run."""
        return self.num_pages - self.num_resident_pages

    @property
    def needed_bytes(self) -> tuple[int, ...]:
        """What each rank needs to run."""
        return tuple(one.num_pages * one.page_bytes for one in self._ranks)

    @property
    def resident_bytes(self) -> tuple[int, ...]:
        """What of it each rank has."""
        return tuple(one.num_resident_pages * one.page_bytes for one in self._ranks)

    @property
    def missing_bytes(self) -> tuple[int, ...]:
        """What has to come on each rank before a step may run."""
        return tuple(one.num_missing_pages * one.page_bytes for one in self._ranks)

    def pages_without(self, num_pages: int) -> int:
        """Return how many pages are left when the last `num_pages` are missing."""
        return max(self.num_pages - num_pages, 0)

    @property
    def _ranks(self) -> tuple["WeightStatus", ...]:
        return self.of_ranks or (self,)


def merge(statuses: Iterable[WeightStatus]) -> WeightStatus:
    """Return what holds for several ranks, which lack their last pages together.

    So what is missing is what the rank lacks that lacks most. A rank with fewer pages has none left
    when that is more than it has; what it has, needs and lacks stays its own.
    """
    found = tuple(statuses)
    if len(found) == 1:
        return found[0]
    num_pages = max(status.num_pages for status in found)
    num_missing = max(status.num_missing_pages for status in found)
    return WeightStatus(
        num_pages,
        num_pages - num_missing,
        max(status.page_bytes for status in found),
        all(status.is_copied for status in found),
        found,
    )
