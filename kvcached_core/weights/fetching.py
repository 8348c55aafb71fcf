"""Pages of weights that come from a replica: copied between devices, and looked at before trust.

Whatever became of the replica meanwhile, a page is right if it has the sums that the host copy
knows of it. Nobody uses it before that is seen.
"""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

from kvcached_core.errors import OutOfMemoryError
from kvcached_core.memory.vmm.backend import SharingBackend
from kvcached_core.weights.exporting import Wish
from kvcached_core.weights.image import Image
from kvcached_core.weights.importing import Replica
from kvcached_core.weights.mapped_pages import mapped_pages
from kvcached_core.weights.rank_row import WeightsRow
from kvcached_core.weights.source import CopySource
from kvcached_core.weights.sums import Sums

LOOK_PAGES = 16  # that are looked at together, while the next ones come

logger = logging.getLogger("kvcached")

Look = Callable[[], Sequence[Sums]]


@dataclass(frozen=True)
class Fetching:
    """Where pages go that come from replicas.

    Attributes:
        image: All pages in front of the first that comes are there.
        row: Its part of the ledger.
        backend: Its backend.
        source: What takes the sums of its pages.
        stream: What that runs on.
        count: Told how many pages have come and are right; others are mapped, too, and are not.
    """

    image: Image
    row: WeightsRow
    backend: SharingBackend
    source: CopySource
    stream: int
    count: Callable[[int], None]

    def take(self, replica: Replica, wish: Wish) -> int:
        """Have pages from a replica, and return how many of the first have come and are right.

        Raises:
            OutOfMemoryError: If there is no memory for more; what came is counted.
            BackendError: If the backend fails.
        """
        looks: list[Look] = []
        end = looked = wish.first
        num_right = 0
        addresses, started = replica.addresses(), time.monotonic()
        pages = mapped_pages(self.image, self.row, end, end + len(wish.sums))
        try:
            with closing(addresses), closing(pages):
                for address, page in zip(addresses, pages, strict=False):
                    page_bytes = self.image.page_bytes
                    self.backend.copy_between(self.image.page_address(page), address, page_bytes)
                    end = page + 1
                    if end - looked == LOOK_PAGES:
                        looks.append(self._look(looked, LOOK_PAGES))
                        looked = end
        finally:
            looks.append(self._look(looked, end - looked))
            num_right = _num_right(looks, wish.sums)
            self.backend.finish_copies()
            self.count(num_right)
        if num_right < end - wish.first:
            logger.info("kvcached: page %d of a replica has changed", wish.first + num_right)
        if num_right:
            seconds = time.monotonic() - started
            logger.info("kvcached: %d pages came from a replica in %.3f s", num_right, seconds)
        return num_right

    def _look(self, first: int, num_pages: int) -> Look:
        """Begin to take the sums of pages that are on their way."""
        self.backend.join_copies(self.stream)
        try:
            return self.source.begin_sums(first, num_pages)
        except OutOfMemoryError:
            return list  # nobody knows whether they are right


def _num_right(looks: Sequence[Look], wanted: Sequence[Sums]) -> int:
    """Return how many pages in front of the first wrong one there are."""
    num_right = 0
    for look in looks:
        found = look()
        for sums in found:
            if sums != wanted[num_right]:
                return num_right
            num_right += 1
        if not found:
            break
    return num_right
