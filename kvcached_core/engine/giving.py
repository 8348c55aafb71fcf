"""What an engine gives to its neighbours, or to its own limit: pages of any of its pools.

Weights go after all of them, and only to neighbours.
"""

from collections.abc import Callable

from kvcached_core.engine.holds import Holds
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
        is_awaiting: Whether there are pages that go when holds have ended (`Holds.num_awaited`).
        is_answer_due: Whether an ask stays open until holds have ended (see `Holds.num_awaited`).
        has_paid: Whether pages were closed since for which nobody was told that they come.
        weights: The engine's weights.

    Args:
        ranks: Whose clock counts.
        port: The engine.
        pools: The engine's pools, that of all layers first.
        tell: Tells peers and workers what was closed; with `wait` it returns when that is done, and
            with `is_last` nothing more comes of what was asked.
    """

    def __init__(
        self,
        ranks: Ranks,
        port: EnginePort,
        pools: list[Pages],
        tell: Callable[..., None],
    ) -> None:
        self.owed_pages = 0
        self.is_awaiting = self.is_answer_due = self.has_paid = False
        self.weights = WeightsKept()
        self._ranks = ranks
        self._port = port
        self._pools = pools
        self._tell = tell
        self._yielded_pages = 0
        self._yielded_until = 0.0
        self._num_tried_blocks = 0
        self._owed_awaited_pages = 0  # of those that holds keep

    def give(self, wanted: WantedPages) -> None:
        """Give what others or the limit want: empty pages, cached ones, weights, requests' own.

        Requests stop in the next schedule, for what is owed then. What is asked beyond that comes
        of what is free next. Nobody waits for a copy where pages without one are enough. For pages
        that only holds keep no request stops: they are on their way, and what is wanted is looked
        at again when holds have ended.
        """
        num_left = wanted.asked_pages
        self._end_awaiting()
        if num_left > FIRST_PAGES and not self._port.is_busy():
            # An idle engine has nothing better to do than to see its first pages go.
            num_left -= self.close(FIRST_PAGES)
            self._tell(wait=True, is_last=False)
        num_left -= self.close(num_left)
        is_waited_for = wanted.owed_pages > 0 or not self._port.is_busy()
        if is_waited_for and self._has_ended_copies(num_left):
            num_left -= self.close(num_left)
        num_owed = min(num_left, wanted.owed_pages)
        num_left -= self._await_holds(num_left)
        if num_left > wanted.owed_pages and self.weights.can_give:
            self._tell(wait=True, is_last=False)
            num_left -= self._give_weights(num_left - wanted.owed_pages)
        # Also when nothing is asked any more: a limit that was lifted leaves no debt.
        self.owed_pages = max(min(num_left, wanted.owed_pages), 0)
        self._yielded_pages = max(num_left - self.owed_pages, 0)
        self._yielded_until = self._ranks.clock() + YIELD_SECONDS
        num_awaited = self._holds.num_awaited
        self._owed_awaited_pages = min(max(num_owed - self.owed_pages, 0), num_awaited)
        self.is_answer_due = num_awaited > 0
        if wanted.asked_pages:
            self._tell(wait=False, is_last=not self.is_answer_due)
            self._port.publish()

    @property
    def is_debt_held(self) -> bool:
        """Whether what is owed is on its way: a new request would take it again, and be stopped."""
        return self._owed_awaited_pages > 0

    def go_on(self) -> None:
        """Close what was on its way, for nothing that is asked still, now that holds have ended.

        What requests took again of what was owed is owed again.
        """
        num_left, num_owed = self._holds.num_awaited, self._owed_awaited_pages
        self._end_awaiting()
        num_closed = self.close(num_left)
        num_left -= num_closed
        num_owed = max(num_owed - num_closed, 0)
        self._owed_awaited_pages = min(self._await_holds(num_left), num_owed)
        num_left -= self._holds.num_awaited
        self.owed_pages += min(num_left, num_owed - self._owed_awaited_pages)
        if self._has_given_all():
            self.owed_pages = 0

    def pay(self) -> bool:
        """Close more of what is owed: requests may have stopped for it, or have ended.

        Returns:
            Whether nothing is owed any more.
        """
        if self.owed_pages:
            self.owed_pages -= self._close_for(self.owed_pages)
            if self._has_ended_copies(self.owed_pages):
                self.owed_pages -= self._close_for(self.owed_pages)
            num_awaited = self._await_holds(self.owed_pages)
            self._owed_awaited_pages += num_awaited
            self.owed_pages -= num_awaited
            if self._has_given_all():  # pages may have gone for another reason, such as a sleep
                self.owed_pages = 0
        elif self.is_yielding() and self._has_more():
            self._yielded_pages -= self._close_for(self._yielded_pages)
            self._yielded_pages -= self._await_holds(self._yielded_pages)
        return not self.owed_pages

    def holds_back(self) -> bool:
        """Give what came free of what is yielded; return whether a new request has to wait for it.

        As long as something runs: that will end, and free something.
        """
        if not self.is_yielding() or not self._port.is_live():
            return False
        self.pay()
        return self.is_yielding()

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

    @property
    def _holds(self) -> Holds:
        return self._pools[0].book.holds

    def _close_for(self, num_pages: int) -> int:
        """Close pages in a schedule, whose end tells the workers; see `close`."""
        num_closed = self.close(num_pages)
        self.has_paid |= self.is_answer_due and num_closed > 0
        return num_closed

    def _has_ended_copies(self, num_pages: int) -> bool:
        """Return whether there may be more to close, as copies kept some of the cache until now.

        To wait for what is left of them is less than to compute a request again that stops.
        """
        return num_pages > 0 and self._port.end_copies()

    def _num_held(self) -> int:
        """Return how many empty pages only holds keep, beside those that are on their way."""
        holds = self._holds
        if not holds:
            return 0
        return max(sum(pages.num_held_empty() for pages in self._pools) - holds.num_awaited, 0)

    def _await_holds(self, num_pages: int) -> int:
        """Let up to so many pages that only copies keep be on their way; return how many it is."""
        if num_pages <= 0 or not self._holds:
            return 0
        # An engine may lock what it copies in its cache: about so many pages' worth.
        num_locked = sum(
            -(-self._port.num_locked_blocks(number) // pages.geometry.blocks_per_page)
            for number, pages in enumerate(self._pools)
        )
        num_awaited = min(self._num_held() + num_locked, num_pages)
        self._holds.num_awaited += num_awaited
        self.is_awaiting |= num_awaited > 0
        return num_awaited

    def _end_awaiting(self) -> None:
        holds = self._holds
        holds.num_awaited = self._owed_awaited_pages = 0
        holds.has_ended = self.is_awaiting = False

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
        """Return whether page 0 of each arena alone is left, which never goes."""
        num_pages = sum(pages.num_resident_pages for pages in self._pools)
        num_pages -= self._holds.num_awaited
        return num_pages == sum(pages.has_page_0 for pages in self._pools)

    def _has_more(self) -> bool:
        """Return whether more blocks hold nothing live than when pages were looked for last."""
        num_tried, self._num_tried_blocks = self._num_tried_blocks, self._port.num_idle_blocks()
        return self._num_tried_blocks > num_tried
