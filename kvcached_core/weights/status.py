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
    """

    num_pages: int
    num_resident_pages: int
    page_bytes: int
    is_copied: bool

    @property
    def num_missing_pages(self) -> int:
        """Pages that have to come before a step may run."""
        return self.num_pages - self.num_resident_pages


def merge(statuses: Iterable[WeightStatus]) -> WeightStatus:
    """Return what holds for each of several ranks, of which one has the most pages.

    A rank with fewer pages has all of its own when it is told to have more. So what is missing is
    what the rank lacks that lacks most, and what each has to allocate is never above that.
    """
    found = list(statuses)
    num_pages = max(status.num_pages for status in found)
    num_missing = max(status.num_missing_pages for status in found)
    return WeightStatus(
        num_pages,
        num_pages - num_missing,
        max(status.page_bytes for status in found),
        all(status.is_copied for status in found),
    )
