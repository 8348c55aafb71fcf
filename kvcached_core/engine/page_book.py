"""The pages of an arena that no pool has, and the orders about all of its pages."""

import time
from collections.abc import Callable, Collection, Hashable
from heapq import heappop, heappush

from kvcached_core.engine.holds import Holds
from kvcached_core.memory.orders import PageOrders, PendingOrders

# How often the counts alone are told while requests are live; every report takes the ledger's lock
# in front of a step.
REPORT_SECONDS = 0.05


class PageBook:
    """The pages of an arena that no pool has, and the orders about all of them.

    The pools of one arena share it, so a page has one order, whichever pool closes or opens it.

    Attributes:
        holds: Which pages stay mapped for a copy, of the rank's other arenas, too.

    Args:
        num_pages: Pages of the arena. Page 0 is mapped for good, and is none of these.
        clock: Returns seconds.
        orders: Those about pages of a rank's other arenas, too, where it has several.
        first_page: The number of this arena's page 0 in them.
        holds: Those of pages of the other arenas, too.
    """

    def __init__(
        self,
        num_pages: int,
        clock: Callable[[], float] = time.monotonic,
        orders: PendingOrders | None = None,
        first_page: int = 0,
        holds: Holds | None = None,
    ) -> None:
        self.orders = PendingOrders() if orders is None else orders
        self.first_page = first_page
        self.holds = Holds() if holds is None else holds
        self.num_promised = 0
        self._unmapped = list(range(1, num_pages))
        self._clock = clock
        self._reported = (0, 0)
        self._look_again_at = 0.0  # while requests are live and no page has an order

    @property
    def num_left(self) -> int:
        """Pages that are neither mapped nor promised."""
        return len(self._unmapped) - self.num_promised

    def take_unmapped(self) -> int:
        """Return the lowest unmapped page, which its pool was promised."""
        return heappop(self._unmapped)

    def put_back(self, page: int) -> None:
        """Have a page that is unmapped again."""
        heappush(self._unmapped, page)

    def freed_ids(self, ids_per_page: int) -> list[int]:
        """See `Holds.freed_ids`."""
        return self.holds.freed_ids(ids_per_page, self.first_page)

    def hold(self, pages: Collection[int], holder: Hashable) -> None:
        """See `Holds.hold`."""
        self.holds.hold({self.first_page + page for page in pages}, holder)

    def hold_later(self, find_pages: Callable[[], Collection[int]], holder: Hashable) -> None:
        """See `Holds.hold_later`."""
        first_page = self.first_page
        self.holds.hold_later(lambda: {first_page + page for page in find_pages()}, holder)

    def held_of(self, pages: Collection[int]) -> set[int]:
        """See `Holds.held_of`."""
        first_page = self.first_page
        if not first_page:
            return self.holds.held_of(pages)
        return {page - first_page for page in self.holds.held_of([first_page + p for p in pages])}

    def need(self, page: int) -> None:
        """See `PendingOrders.need`."""
        self.orders.need(self.first_page + page)

    def open(self, page: int, *, is_spare: bool) -> bool:
        """See `PendingOrders.open`."""
        return self.orders.open(self.first_page + page, is_spare=is_spare)

    def close(self, page: int) -> bool:
        """See `PendingOrders.close`."""
        return self.orders.close(self.first_page + page)

    def take_orders(
        self, count_pages: Callable[[], tuple[int, int]], *, is_live: bool
    ) -> PageOrders | None:
        """Return the orders since the last call, or None if there is nothing to tell.

        Args:
            count_pages: Returns how many pages are used and cached.
            is_live: Requests run, so changed counts alone are told seldom.
        """
        ordered, now = self.orders.kinds, self._clock()
        if is_live and not ordered and now < self._look_again_at:
            return None
        self._look_again_at = now + REPORT_SECONDS
        counts = count_pages()
        if not ordered and counts == self._reported:
            return None
        self._reported = counts
        return self.orders.take(*counts)
