"""What is promised before a schedule of an engine that plans by counting.

It counts the blocks that are free before it lets requests in, takes them for all of a batch, and
ends if there are fewer. So what a batch may take is promised before, or not counted on.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from kvcached_core.engine.counted_blocks import CountedBlocks
from kvcached_core.engine.demand import Demand


class Counting(Protocol):
    """An engine that counts; see `LoopingPort`."""

    free_lists: list[CountedBlocks]

    def demand_of(self, number: int, demand: Demand) -> Demand:
        """Return what the next batch takes of a pool."""

    def num_cached_blocks(self, number: int) -> int:
        """Return the blocks that only the prefix cache wants in a pool."""


class BatchPromise:
    """The promise that a batch gets. The scheduler's thread calls it.

    Args:
        port: The engine.
        promise: See `ElasticEngine.promise`.
        ask: See `Ranks.ask`.
    """

    def __init__(
        self,
        port: Counting,
        promise: Callable[[Sequence[int]], None],
        ask: Callable[[int], None],
    ) -> None:
        self._port = port
        self._promise = promise
        self._ask = ask

    def take(self, demand: Demand) -> None:
        """Take a promise of what the next batch takes at most, or of what there is of it.

        Where no waiting request can be let in anyhow, nothing is promised for one: it would go back
        after the schedule, and a neighbour that asked meanwhile would have stopped a request. Then
        others are only asked, and nothing is counted on but what is free.
        """
        num_pools = len(self._port.free_lists)
        demands = [self._port.demand_of(number, demand) for number in range(num_pools)]
        if not demand.num_least or self._fits(demands):
            self._promise_all([each.num_running + each.num_queued for each in demands])
        else:
            self._ask_beyond(demands)

    def num_evictable_too(self, number: int) -> int:
        """Return the blocks of a pool that are available, or only cached."""
        free_list = self._port.free_lists[number]
        return free_list.num_available_blocks() + self._port.num_cached_blocks(number)

    def _fits(self, demands: Sequence[Demand]) -> bool:
        """Return whether one waiting request can be let in, by each pool of which it has to ask."""
        return all(
            each.num_running + each.num_least <= self.num_evictable_too(number)
            for number, each in enumerate(demands)
            if each.num_least
        )

    def _promise_all(self, num_blocks: Sequence[int]) -> None:
        free_lists = self._port.free_lists
        missing = [
            number - free_list.num_free_blocks
            for free_list, number in zip(free_lists, num_blocks, strict=True)
        ]
        if max(missing) <= 0:
            return
        self._promise(missing)
        for free_list, number in zip(free_lists, missing, strict=True):
            # What is not promised cannot be counted on: an allocation that fails ends the engine.
            free_list.is_bound = free_list.pages.num_ready_blocks < number

    def _ask_beyond(self, demands: Sequence[Demand]) -> None:
        """Promise what runs its next blocks, and only ask others for the rest."""
        self._promise_all([each.num_running for each in demands])
        num_lacking = 0
        for free_list, each in zip(self._port.free_lists, demands, strict=True):
            num_wanted = each.num_running + each.num_queued
            num_lacking += free_list.pages.num_lacking(num_wanted - free_list.num_free_blocks)
            free_list.is_bound = True  # one with a cached prefix needs less, and may come in
        self._ask(num_lacking)
