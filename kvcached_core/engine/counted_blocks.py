"""The blocks of a pool whose engine keeps the list of free ones, and counts on a number of them.

The engine knows which blocks are free, as a tensor on the device; `Pages` knows which pages are
open, and only their blocks are in the list. What lies on a page is counted only when somebody wants
pages back: counting waits for the device.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence

import torch

from kvcached_core.engine.giving import Giving
from kvcached_core.engine.pages import Pages
from kvcached_core.engine.ranks import Ranks
from kvcached_core.memory.id_tensors import fullest_first, ids_on, pages_of, without


class CountedBlocks(ABC):
    """The `Blocks` of one pool, and how many of them its engine may count on.

    The scheduler's thread calls all of this.

    Attributes:
        is_nominal: While the engine adds up its blocks: those of closed pages count, too.
        is_bound: While a schedule counts only on what is promised.
        num_set_aside: Free blocks that a batch takes when its outcome is looked at: nothing else
            may count on them, and their pages stay.

    Args:
        make_pages: Returns the pages that the blocks are on.
        ranks: They say what would be promised.
        giving: It says what is owed.
        count_cached: Returns about how many of the blocks no request needs.
    """

    def __init__(
        self,
        make_pages: Callable[["CountedBlocks"], Pages],
        ranks: Ranks,
        giving: Giving,
        count_cached: Callable[[], int],
    ) -> None:
        self.is_nominal = self.is_bound = False
        self.num_set_aside = 0
        self._ranks = ranks
        self._giving = giving
        self._count_cached = count_cached
        self._added: list[int] = []  # pages that are open, and whose blocks are not listed yet
        self.pages = make_pages(self)
        # Page 0, where it is this pool's, is open from the first and begins with the padding block.
        self._num_padding_blocks = self.pages.num_open_pages
        self.fill()

    @property
    @abstractmethod
    def num_free_blocks(self) -> int:
        """Free blocks on open pages."""

    @property
    @abstractmethod
    def num_blocks(self) -> int:
        """Blocks that the engine believes it has, the padding block left out."""

    @property
    @abstractmethod
    def free_ids(self) -> torch.Tensor:
        """The engine's list of free blocks on open pages; ours takes its place."""

    @free_ids.setter
    @abstractmethod
    def free_ids(self, ids: torch.Tensor) -> None: ...

    @abstractmethod
    def gather(self) -> None:
        """Have every free block in `free_ids`, also what an engine keeps beside for a while."""

    @property
    def num_taken_blocks(self) -> int:
        """Blocks of requests and of the prefix cache."""
        return self._num_open_blocks - self.num_free_blocks

    def num_available_blocks(self) -> int:
        """Return what can be had without evicting: free and promised blocks, and more."""
        num_free = self.num_free_blocks
        largest = self.num_blocks - (self._num_open_blocks - num_free)
        if self.is_nominal:
            return largest
        if self._giving.owed_pages:
            return 0  # free blocks here and there do not pay whole pages
        num_blocks = max(num_free + self.pages.num_ready_blocks - self.num_set_aside, 0)
        if not self.is_bound:
            num_blocks += self._ranks.room_pages * self.pages.geometry.blocks_per_page
        return min(num_blocks, largest)

    def open(self, num_blocks: int) -> None:
        """Open pages until so many blocks are free, as far as they are promised."""
        missing = num_blocks - self.num_free_blocks
        if missing > 0:
            self.pages.promise_blocks(missing, is_urgent=True)
            self.pages.open_blocks(missing)
            listed = self.free_ids
            ids, self._added = ids_on(self._added, self.pages.geometry, listed.device), []
            self.free_ids = torch.cat((listed, ids))

    def fill(self) -> None:
        """Make every block of the open pages free, but for the padding block."""
        pages, device = self.pages, self.free_ids.device
        ids, self._added = ids_on(pages.open_pages, pages.geometry, device), []
        self.free_ids = ids[self._num_padding_blocks :]

    def hold(self, find_ids: Callable[[], torch.Tensor], holder: Hashable) -> None:
        """Keep the pages of these blocks mapped while a copy of them is open; see `Pages.hold`."""
        geometry = self.pages.geometry
        self.pages.hold_later(lambda: pages_of(find_ids(), geometry), holder)

    def num_empty_pages(self, *, is_live: bool) -> int:  # noqa: ARG002  counting them is dear
        """See `Blocks.num_empty_pages`: as many as the free blocks would fill."""
        num_blocks = max(self.num_free_blocks - self.num_set_aside, 0)
        return num_blocks // self.pages.geometry.blocks_per_page

    def add(self, page: int) -> None:
        """See `Blocks.add`; the blocks of all pages that a call opened are listed together."""
        self._added.append(page)

    def remove(self, pages: Sequence[int]) -> None:
        """See `Blocks.remove`."""
        self.free_ids = without(self.free_ids, pages, self.pages.geometry)

    def empty_pages(self) -> list[int]:
        """See `Blocks.empty_pages`: the highest first. The list is put in order, too.

        The blocks on the fullest pages are taken next, so that pages empty out. Pages that are left
        out stay for blocks that are set aside.
        """
        self.gather()
        pages = self.pages
        self.free_ids, empty = fullest_first(self.free_ids, pages.geometry, pages.num_pages)
        per_page = pages.geometry.blocks_per_page
        num_elsewhere = self.num_free_blocks - len(empty) * per_page
        num_kept = max(-(-(self.num_set_aside - num_elsewhere) // per_page), 0)
        return empty[num_kept:][::-1]

    def count_pages(self) -> tuple[int, int]:
        """See `Blocks.count_pages`: how many pages' worth, by blocks, is used and is cached."""
        per_page = self.pages.geometry.blocks_per_page
        num_cached = min(self._count_cached(), self.num_taken_blocks)
        num_used = self.num_taken_blocks - num_cached + self._num_padding_blocks
        num_open = self.pages.num_open_pages
        used_pages = min(-(-num_used // per_page), num_open)
        return used_pages, min(-(-num_cached // per_page), num_open - used_pages)

    @property
    def _num_open_blocks(self) -> int:
        return self.pages.num_open_blocks - self._num_padding_blocks
