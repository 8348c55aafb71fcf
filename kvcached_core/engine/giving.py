"""What an engine gives to its neighbours, or to its own limit: pages of any of its pools.

Weights go after all of them, and only to neighbours.
"""

from collections.abc import Callable

from kvcached_core.engine.pages import Pages
from kvcached_core.engine.port import EnginePort
from kvcached_core.engine.ranks import Ranks, WantedPages
from kvcached_core.engine.waiting import REFUSAL_SECONDS
from kvcached_core.engine.weights_kept import WeightsKept

# Pages that a neighbour gets early when it asks for many: the rest follows when all is evicted.
FIRST_PAGES = 8

# How long an engine lets a neighbour have what comes free, after it was asked last: a neighbour
# that waits asks again well before. Without this its own queue takes every block first that a
# request leaves, and pages that were asked for never become empty.
YIELD_SECONDS = 4 * REFUSAL_SECONDS


class Giving:
    """Closes pages: spare and empty ones first, then those that only the prefix cache wants.

    The scheduler's thread calls it.

    Attributes:
        owed_pages: To be given, by stopping requests if it must be.
        weights: The engine's weights.

    Args:
        ranks: Whose clock counts.
        port: The engine.
        pools: The engine's pools, that of all layers first.
        tell: Tells peers and workers what was closed; with `wait` it returns when that is done.
    """

    def __init__(
        self,
        ranks: Ranks,
        port: EnginePort,
        pools: list[Pages],
        tell: Callable[..., None],
    ) -> None:
        self.owed_pages = 0
        self.weights = WeightsKept()
        self._ranks = ranks
        self._port = port
        self._pools = pools
        self._tell = tell
        self._yielded_pages = 0
        self._yielded_until = 0.0
        self._num_tried_blocks = 0

    def give(self, wanted: WantedPages) -> None:
        """Give what others or the limit want: empty pages, cached ones, weights, requests' own.

        Requests stop in the next schedule, for what is owed then. What is asked beyond that comes
        of what is free next.
        """
        num_left = wanted.asked_pages
        if num_left > FIRST_PAGES and not self._port.is_busy():
            # An idle engine has nothing better to do than to see its first pages go.
            num_left -= self.close(FIRST_PAGES)
            self._tell(wait=True)
        num_left -= self.close(num_left)
        if num_left > wanted.owed_pages and self.weights.can_give:
            self._tell(wait=True)
            num_left -= self._give_weights(num_left - wanted.owed_pages)
        # Also when nothing is asked any more: a limit that was lifted leaves no debt.
        self.owed_pages = max(min(num_left, wanted.owed_pages), 0)
        self._yielded_pages = max(num_left - self.owed_pages, 0)
        self._yielded_until = self._ranks.clock() + YIELD_SECONDS
        if wanted.asked_pages:
            self._tell(wait=False)
            self._port.publish()

    def pay(self) -> bool:
        """Close more of what is owed: requests may have stopped for it, or have ended.

        Returns:
            Whether nothing is owed any more.
        """
        if self.owed_pages:
            self.owed_pages -= self.close(self.owed_pages)
            if self._has_given_all():  # pages may have gone for another reason, such as a sleep
                self.owed_pages = 0
        elif self.is_yielding() and self._has_more():
            self._yielded_pages -= self.close(self._yielded_pages)
        return not self.owed_pages

    def is_yielding(self) -> bool:
        """Return whether a neighbour comes before a new request, as long as something runs here.

        What runs will end, and free something.
        """
        return self._yielded_pages > 0 and self._ranks.clock() < self._yielded_until

    def close(self, num_pages: int) -> int:
        """Close up to so many pages that no request needs; return how many it was."""
        num_closed = self._close_empty(num_pages)
        while num_closed < num_pages and self._port.evict(num_pages - num_closed):
            num_closed += self._close_empty(num_pages - num_closed)
        return num_closed

    def _give_weights(self, num_pages: int) -> int:
        """Give weights in the place of so many pages; return for how many pages it is enough."""
        page_bytes = self._pools[0].geometry.page_bytes
        return self.weights.give(num_pages * page_bytes) // page_bytes

    def _close_empty(self, num_pages: int) -> int:
        num_closed = 0
        for pages in self._pools:
            if num_closed < num_pages:
                num_closed += pages.close_empty(num_pages - num_closed)
        return num_closed

    def _has_given_all(self) -> bool:
        """Return whether page 0 alone is left, which never goes."""
        num_pages = sum(pages.num_resident_pages for pages in self._pools)
        return num_pages == (len(self._pools) == 1)  # of several pools it is none of theirs

    def _has_more(self) -> bool:
        """Return whether more blocks hold nothing live than when pages were looked for last."""
        num_tried, self._num_tried_blocks = self._num_tried_blocks, self._port.num_idle_blocks()
        return self._num_tried_blocks > num_tried
