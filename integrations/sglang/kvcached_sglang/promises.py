"""What a scheduler is promised before each schedule, so that no allocation in it fails."""

from typing import TYPE_CHECKING

from kvcached_core.engine.ranks import Ranks
from kvcached_sglang.demand import Demand

if TYPE_CHECKING:
    from kvcached_sglang.free_list import FreeList


class Promises:
    """The promises of one schedule, of all pools.

    Args:
        ranks: Who promises.
        free_lists: The lists of free blocks, that of the pool of all layers first.
    """

    def __init__(self, ranks: Ranks, free_lists: "list[FreeList]") -> None:
        self._ranks = ranks
        self._free_lists = free_lists

    def take(self, demand: Demand, evictable_tokens: int) -> None:
        """Take a promise of what the next batch takes at most, or of what there is of it.

        Where no waiting request can be let in anyhow, nothing is promised for one: it would go back
        after the schedule, and a neighbour that asked meanwhile would have stopped a request. Then
        others are only asked, and nothing is counted on but what is free.

        Args:
            demand: What the next batch takes at most.
            evictable_tokens: Tokens of the prefix cache that no request holds, in the pool of all
                layers.
        """
        wanted = demand.num_running + demand.num_queued
        if demand.num_least and not self._fits(demand, evictable_tokens):
            self._reserve(demand.num_running)
            room = self._ranks.room_pages
            lacking = [
                free_list.pages.num_lacking(wanted - free_list.num_free_blocks)
                for free_list in self._free_lists
            ]
            self._ranks.ask(sum(lacking) - room)
            for free_list in self._free_lists:
                free_list.is_bound = True  # one with a cached prefix needs less, and may come in
        else:
            self._reserve(wanted)

    def _fits(self, demand: Demand, evictable_tokens: int) -> bool:
        """Return whether one waiting request can be let in, by the pool of all layers.

        What leaves a window comes back, so of the other pool a request never needs all its tokens.
        """
        free_list = self._free_lists[0]
        needed = (demand.num_running + demand.num_least) * free_list.block_tokens
        return needed <= free_list.available_tokens() + evictable_tokens

    def _reserve(self, num_blocks: int) -> None:
        missing = [num_blocks - free_list.num_free_blocks for free_list in self._free_lists]
        if len(missing) > 1:
            self._split_room(missing)
        for free_list, number in zip(self._free_lists, missing, strict=True):
            if number > 0:
                free_list.pages.promise_blocks(number, is_urgent=True)
                # What is not promised cannot be counted on: an allocation that fails ends SGLang.
                free_list.is_bound = free_list.pages.num_ready_blocks < number

    def _split_room(self, missing: list[int]) -> None:
        """Where there are fewer pages than both pools want, promise each its share first."""
        pages = [free_list.pages for free_list in self._free_lists]
        wanted = [one.num_lacking(number) for one, number in zip(pages, missing, strict=True)]
        room = self._ranks.room_pages
        if sum(wanted) > room:
            for one, number in zip(pages, wanted, strict=True):
                one.promise(room * number // sum(wanted), is_urgent=True)
