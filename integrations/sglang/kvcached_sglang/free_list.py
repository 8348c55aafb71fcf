"""SGLang's list of free blocks over elastic pages: only blocks of open pages are in it."""

from collections.abc import Callable
from typing import Any

import torch

from kvcached_sglang.blocks import BlockPages


class FreeList:
    """The free list of one allocator, whose own code takes from it and gives to it.

    SGLang calls a block a page; what it calls a size counts tokens.

    Args:
        allocator: SGLang's allocator.
        count_tokens: Returns the tokens in its list, as SGLang counts them.
        pages: The pages that the blocks are on.
        room: Returns how many more blocks would be promised now.
    """

    def __init__(
        self,
        allocator: Any,
        count_tokens: Callable[[], int],
        pages: BlockPages,
        room: Callable[[], int],
    ) -> None:
        self.pages = pages
        self.block_tokens: int = allocator.page_size
        self.is_owing = False  # pages are to be given back, by stopping requests if it must be
        self.is_nominal = False  # while SGLang adds up its tokens: closed pages count, too
        self.is_bound = False  # while a schedule counts only on what is promised
        self._allocator = allocator
        self._count_tokens = count_tokens
        self._room = room

    @property
    def num_free_blocks(self) -> int:
        """Free blocks on open pages."""
        return self._count_tokens() // self.block_tokens

    @property
    def num_taken_blocks(self) -> int:
        """Blocks of requests and of the prefix cache."""
        return self.pages.num_open_blocks - self.num_free_blocks

    def available_tokens(self) -> int:
        """Return what can be had without evicting: free and promised tokens, and more."""
        num_free = self.num_free_blocks
        num_taken = self.pages.num_open_blocks - num_free
        largest = int(self._allocator.size) // self.block_tokens - num_taken
        if self.is_nominal:
            return largest * self.block_tokens
        if self.is_owing:
            return 0  # free blocks here and there do not pay whole pages
        num_blocks = num_free + self.pages.num_ready_blocks
        if not self.is_bound:
            num_blocks += self._room()
        return min(num_blocks, largest) * self.block_tokens

    def count_pages(self, num_cached_tokens: int) -> tuple[int, int]:
        """Return how many open pages' worth is used, and how many more are cached, by tokens."""
        per_page = self.pages.geometry.blocks_per_page
        num_cached = num_cached_tokens // self.block_tokens
        num_used = self.num_taken_blocks - num_cached + self.pages.num_padding_blocks
        num_open = self.pages.num_open_pages
        used_pages = min(-(-num_used // per_page), num_open)
        return used_pages, min(-(-num_cached // per_page), num_open - used_pages)

    def open(self, num_blocks: int) -> None:
        """Open pages until so many blocks are free, as far as they are promised."""
        missing = num_blocks - self.num_free_blocks
        if missing > 0:
            ids = self.pages.open_blocks(missing)
            self._allocator.free_pages = torch.cat((self._allocator.free_pages, ids))

    def fill(self) -> None:
        """Make every block of the open pages free."""
        self._allocator.free_pages = self.pages.all_ids()

    def release(self, max_pages: int, *, keep: int = 0) -> list[int]:
        """Close up to `max_pages` empty pages, all but `keep`; return them, to be unmapped."""
        allocator = self._allocator
        allocator.merge_and_sort_free()
        allocator.free_pages, closed = self.pages.close(allocator.free_pages, max_pages, keep=keep)
        return closed
