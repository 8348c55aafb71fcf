"""What a scheduler gives to its neighbours, or to its own limit: pages of any of its pools."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvcached_core.engine.instance import REFUSAL_SECONDS
from kvcached_core.engine.ranks import Ranks, Wanted
from kvcached_sglang.requests import evictable_tokens

if TYPE_CHECKING:
    from kvcached_sglang.free_list import FreeList


# How long an engine lets a neighbour have what comes free, after it was asked last: who waits asks
# again well before. Without this its own queue takes every block first that a request leaves, and
# pages that were asked for never become empty.
YIELD_SECONDS = 4 * REFUSAL_SECONDS


class Giving:
    """Closes pages: empty ones first, then those that only the prefix cache wants.

    Args:
        ranks: Who is told what is given.
        free_lists: The lists of free blocks, that of the pool of all layers first.
        tell: Has closed pages unmapped behind the last step.
    """

    def __init__(
        self, ranks: Ranks, free_lists: "list[FreeList]", tell: Callable[[], None]
    ) -> None:
        self._ranks = ranks
        self._free_lists = free_lists
        self._tell = tell
        self._owed_pages = 0
        self._yielded_pages = 0
        self._yielded_until = 0.0
        self._num_tried_blocks = 0

    def answer(self, wanted: Wanted, tree_cache: Any) -> None:
        """Give what others or the limit want: empty pages, then cached blocks, then requests'.

        What is asked beyond that comes of what is free next.
        """
        num_left = wanted.asked_pages - self._give(tree_cache, wanted.asked_pages)
        self._owe(max(min(num_left, wanted.owed_pages), 0))
        self._yielded_pages = max(num_left - self._owed_pages, 0)
        self._yielded_until = self._ranks.clock() + YIELD_SECONDS

    def pay(self, tree_cache: Any) -> None:
        """Give more of what is owed: requests may have stopped for it, or have ended."""
        if self._owed_pages:
            self._owe(self._owed_pages - self._give(tree_cache, self._owed_pages))
        elif self._is_yielding() and self._has_more(tree_cache):
            self._yielded_pages -= self._give(tree_cache, self._yielded_pages)

    def must_yield(self, scheduler: Any) -> bool:
        """Return whether a neighbour comes before a new request of this engine.

        Only while something runs, which will end and free something.
        """
        return self._is_yielding() and bool(scheduler.running_batch.reqs)

    def close_empty(self, num_pages: int) -> int:
        """Close up to so many empty pages of all pools; return how many it was."""
        num_closed = 0
        for free_list in self._free_lists:
            if num_closed < num_pages:
                num_closed += free_list.pages.close_empty(num_pages - num_closed)
        return num_closed

    def _is_yielding(self) -> bool:
        return self._yielded_pages > 0 and self._ranks.clock() < self._yielded_until

    def _has_more(self, tree_cache: Any) -> bool:
        """Return whether more blocks are free or cached than when pages were looked for last."""
        free_list = self._free_lists[0]
        num_blocks = free_list.num_free_blocks
        num_blocks += evictable_tokens(tree_cache) // free_list.block_tokens
        num_tried, self._num_tried_blocks = self._num_tried_blocks, num_blocks
        return num_blocks > num_tried

    def _owe(self, num_pages: int) -> None:
        self._owed_pages = num_pages
        for free_list in self._free_lists:
            free_list.is_owing = num_pages > 0

    def _give(self, tree_cache: Any, num_pages: int) -> int:
        num_closed = self.close_empty(num_pages)
        while num_closed < num_pages and self._evict(tree_cache, num_pages - num_closed):
            num_closed += self.close_empty(num_pages - num_closed)
        self._ranks.answer(num_closed)
        self._tell()
        return num_closed

    def _evict(self, tree_cache: Any, num_pages: int) -> bool:
        from sglang.srt.mem_cache.base_prefix_cache import EvictParams

        before = [free_list.num_free_blocks for free_list in self._free_lists]
        if not evictable_tokens(tree_cache):
            return False
        free_list = self._free_lists[0]
        num_blocks = num_pages * free_list.pages.geometry.blocks_per_page
        tree_cache.evict(EvictParams(num_tokens=num_blocks * free_list.block_tokens))
        return before != [free_list.num_free_blocks for free_list in self._free_lists]
