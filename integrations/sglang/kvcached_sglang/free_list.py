"""SGLang's list of free blocks over elastic pages: only blocks of open pages are in it.

SGLang knows which blocks are free, as a tensor on the device; `Pages` knows which pages are open.
What lies on a page is counted only when somebody wants pages back: counting waits for the device.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from kvcached_core.engine.pages import Pages
from kvcached_core.errors import PageStateError

if TYPE_CHECKING:
    from kvcached_sglang.engine import SglangEngine

FULLEST_FIRST = 1 << 31  # above every id, so pages are in order before the ids on them are


class FreeList:
    """The free list of one allocator, whose own code takes from it and gives to it; the `Blocks`.

    SGLang calls a block a page; what it calls a size counts tokens. The scheduler's thread calls
    all of this.

    Args:
        allocator: SGLang's allocator.
        count_tokens: Returns the tokens in its list, as SGLang counts them.
        make_pages: Returns the pages that the blocks are on.
        engine: The engine; it says what would be promised, is owed and is cached.
        number: Which of the engine's pools this is.
    """

    def __init__(
        self,
        allocator: Any,
        count_tokens: Callable[[], int],
        make_pages: Callable[["FreeList"], Pages],
        engine: "SglangEngine",
        number: int,
    ) -> None:
        self.block_tokens: int = allocator.page_size
        self.is_nominal = False  # while SGLang adds up its tokens: closed pages count, too
        self.is_bound = False  # while a schedule counts only on what is promised
        self._allocator = allocator
        self._count_tokens = count_tokens
        self._engine = engine
        self._number = number
        self._added: list[int] = []  # pages that are open, and whose blocks are not listed yet
        self.pages = make_pages(self)
        # Page 0, where it is this pool's, is open from the first and begins with the padding block.
        self._num_padding_blocks = self.pages.num_open_pages
        self.fill()

    @property
    def num_free_blocks(self) -> int:
        """Free blocks on open pages."""
        return self._count_tokens() // self.block_tokens

    @property
    def num_taken_blocks(self) -> int:
        """Blocks of requests and of the prefix cache."""
        return self._num_open_blocks - self.num_free_blocks

    def available_tokens(self) -> int:
        """Return what can be had without evicting: free and promised tokens, and more."""
        num_free = self.num_free_blocks
        num_taken = self._num_open_blocks - num_free
        largest = int(self._allocator.size) // self.block_tokens - num_taken
        if self.is_nominal:
            return largest * self.block_tokens
        if self._engine.giving.owed_pages:
            return 0  # free blocks here and there do not pay whole pages
        num_blocks = num_free + self.pages.num_ready_blocks
        if not self.is_bound:
            num_blocks += self._engine.ranks.room_pages * self.pages.geometry.blocks_per_page
        return min(num_blocks, largest) * self.block_tokens

    def open(self, num_blocks: int) -> None:
        """Open pages until so many blocks are free, as far as they are promised."""
        missing = num_blocks - self.num_free_blocks
        if missing > 0:
            self.pages.promise_blocks(missing, is_urgent=True)
            self.pages.open_blocks(missing)
            ids, self._added = self._ids_of(self._added), []
            self._allocator.free_pages = torch.cat((self._allocator.free_pages, ids))

    def fill(self) -> None:
        """Make every block of the open pages free, but for the padding block."""
        ids, self._added = self._ids_of(self.pages.open_pages), []
        self._allocator.free_pages = ids[self._num_padding_blocks :]

    def num_empty_pages(self, *, is_live: bool) -> int:  # noqa: ARG002  counting them is dear
        """See `Blocks.num_empty_pages`: as many as the free blocks would fill."""
        return self.num_free_blocks // self.pages.geometry.blocks_per_page

    def add(self, page: int) -> None:
        """See `Blocks.add`; the blocks of all pages that a call opened are listed together."""
        self._added.append(page)

    def remove(self, pages: Sequence[int]) -> None:
        """See `Blocks.remove`."""
        ids, geometry = self._allocator.free_pages, self.pages.geometry
        closed = torch.tensor(pages, device=ids.device)
        left = ids[~torch.isin(ids // geometry.ids_per_page, closed)]
        if len(ids) - len(left) != len(pages) * geometry.blocks_per_page:
            raise PageStateError(f"pages {sorted(pages)} cannot be closed: not all are empty")
        self._allocator.free_pages = left

    def empty_pages(self) -> list[int]:
        """See `Blocks.empty_pages`: the highest first. The list is put in order, too.

        The blocks on the fullest pages are taken next, so that pages empty out.
        """
        self._allocator.merge_and_sort_free()
        ids, geometry = self._allocator.free_pages, self.pages.geometry
        pages = ids // geometry.ids_per_page
        num_free = torch.bincount(pages, minlength=self.pages.num_pages)
        self._allocator.free_pages = ids[torch.argsort(num_free[pages] * FULLEST_FIRST + ids)]
        empty: list[int] = (num_free == geometry.blocks_per_page).nonzero().flatten().tolist()
        return empty[::-1]

    def count_pages(self) -> tuple[int, int]:
        """See `Blocks.count_pages`: how many pages' worth, by tokens, is used and is cached."""
        per_page = self.pages.geometry.blocks_per_page
        num_cached = self._engine.port.evictable_tokens(self._number) // self.block_tokens
        num_used = self.num_taken_blocks - num_cached + self._num_padding_blocks
        num_open = self.pages.num_open_pages
        used_pages = min(-(-num_used // per_page), num_open)
        return used_pages, min(-(-num_cached // per_page), num_open - used_pages)

    @property
    def _num_open_blocks(self) -> int:
        return self.pages.num_open_blocks - self._num_padding_blocks

    def _ids_of(self, pages: list[int]) -> torch.Tensor:
        geometry = self.pages.geometry
        first = torch.tensor(pages, dtype=torch.int64) * geometry.ids_per_page
        ids = first[:, None] + torch.arange(geometry.blocks_per_page)
        return ids.reshape(-1).to(self._allocator.device, non_blocking=True)
