"""Pages of weights that have changed since they were copied: they are copied before they go."""

import logging
from collections.abc import Callable, Iterable, Sequence

from kvcached_core.errors import HostCopyError
from kvcached_core.weights.host_copy import HostCopy
from kvcached_core.weights.source import CopySource
from kvcached_core.weights.sums import Sums

logger = logging.getLogger("kvcached")


class Changes:
    """What somebody said has changed, and what is seen to have.

    Args:
        back: Returns the copy to be written to; None if host memory has no room for it now.
        source: What it is taken of.
    """

    def __init__(self, back: Callable[[], HostCopy | None], source: CopySource) -> None:
        self._back, self._source = back, source
        self._marked: set[int] = set()

    def mark(self, pages: Iterable[int]) -> None:
        """Take pages for changed, whatever their sums say."""
        self._marked.update(pages)

    def num_clean(self, copy: HostCopy, first: int, wanted: Sequence[Sums]) -> int:
        """Return how many pages from `first` on nobody said have changed, and have these sums.

        Any thread may call it. What changes unseen, it does not see.
        """
        num_clean = 0
        known = copy.known_sums(first, first + len(wanted))
        for page, (found, sums) in enumerate(zip(known, wanted, strict=False), first):
            if found != sums or page in self._marked:
                break
            num_clean += 1
        return num_clean

    def write_back(self, copy: HostCopy, first: int, sums: Sequence[Sums]) -> bool:
        """Have the copy know what the pages of these sums are; return whether it does.

        Raises:
            HostCopyError: If there is no room for that in host memory.
        """
        changed = [
            page
            for page, found in enumerate(sums, first)
            if page in self._marked or found != copy.sums[page]
        ]
        if changed:
            here = self._back()
            if here is None:
                raise HostCopyError(
                    "the copy of them is on the disk, and memory has no room for it"
                )
            if not here.write_back(changed, self._source):
                logger.warning("kvcached: weights change though nothing runs, so they stay")
                return False
        self._marked.difference_update(changed)
        return True
