"""The pages of a pool: which is opened next, which goes back, and what the workers are told.

A page is unmapped, promised, spare, open or closing:

    unmapped --promise--> promised --open--> open --close--> closing --> unmapped
                              |                ^
                              +--> spare ------+

Promised pages are a number, for nobody has chosen them yet. A spare page is ordered to be mapped
soon, and no block of it can be taken before it is opened. A closing page is unmapped here, and the
workers are told. Which blocks of an open page are free, `Blocks` knows.
"""

import time
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence

from kvcached_core.engine.lingering import Lingering
from kvcached_core.engine.page_book import PageBook
from kvcached_core.engine.port import Blocks, PageSource
from kvcached_core.errors import PageStateError
from kvcached_core.memory.geometry import Geometry

# Pages that one schedule gives back while requests are live: no step pays for a whole burst.
MAX_CLOSED_PAGES = 8

# Empty pages that stay when no request is live; with page 0 they are what a quiet engine holds.
NUM_QUIET_PAGES = 1


class Pages:
    """The pages of one pool. The scheduler's thread calls it.

    Attributes:
        freed_ids: Whoever copies blocks after they were freed adds their ids here.
        on_close: Is called with pages that have just been closed.
        has_page_0: Whether page 0 is this pool's, and open from the first.

    Args:
        geometry: What lies in a page.
        num_pages: Pages of the arena.
        source: Who promises pages; page 0 is promised and mapped already.
        blocks: Which blocks of open pages are free.
        min_spare_pages: While requests are live and fewer pages are empty, pages are mapped ahead
            of need (low watermark) ...
        max_spare_pages: ... until so many are empty; what is above goes back (high watermark).
        num_quiet_pages: Empty pages that stay when no request is live.
        idle_seconds: How long pages above the high watermark stay before they go back: the next
            request may want them.
        shared: The book of an arena with several pools. Then page 0 is for the padding block of
            each of them, and for no other; otherwise it is open.
        book: That of an arena for this pool alone; None for one that is made here.
        clock: Returns seconds.
    """

    def __init__(
        self,
        geometry: Geometry,
        num_pages: int,
        source: PageSource,
        blocks: Blocks,
        *,
        min_spare_pages: int = 0,
        max_spare_pages: int = 0,
        num_quiet_pages: int = NUM_QUIET_PAGES,
        idle_seconds: float = 0.0,
        shared: PageBook | None = None,
        book: PageBook | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.geometry = geometry
        self.num_pages = num_pages
        self.min_spare_pages = min_spare_pages
        self.max_spare_pages = max(max_spare_pages, min_spare_pages)
        self.num_quiet_pages = num_quiet_pages
        self._num_spare_promised = self.max_spare_pages if shared is None else 0
        self.has_page_0 = shared is None
        self.book = shared or book or PageBook(num_pages, clock)
        self.freed_ids = self.book.freed_ids(geometry.ids_per_page)
        self.on_close: Callable[[Sequence[int]], None] = lambda _pages: None
        self.num_promised = 0
        self.num_open_blocks = 0  # on open pages
        self.num_ready_blocks = 0  # on spare and promised pages
        self._source = source
        self._blocks = blocks
        self._lingering = Lingering(idle_seconds, clock)
        self._open: set[int] = set()
        self._spare: deque[int] = deque()
        if self.has_page_0:
            self._add(0)

    @property
    def num_open_pages(self) -> int:
        """Pages whose blocks can be taken, or are taken."""
        return len(self._open)

    @property
    def num_resident_pages(self) -> int:
        """Pages that are mapped, or will be before a step needs them."""
        return len(self._open) + len(self._spare)

    @property
    def open_pages(self) -> list[int]:
        """These pages that are open, in ascending order."""
        return sorted(self._open)

    def count_pages(self) -> tuple[int, int]:
        """See `Blocks.count_pages`."""
        return self._blocks.count_pages()

    def promise_blocks(self, num_blocks: int, *, is_urgent: bool = False) -> None:
        """Have `num_blocks` blocks ready on spare and promised pages, or as many as there may be.

        Args:
            num_blocks: Blocks that are needed beside the free ones.
            is_urgent: A request has to wait without them, so others are asked for memory.
        """
        num_pages = self.num_lacking(num_blocks)
        if num_pages:
            self.promise(num_pages, is_urgent=is_urgent)

    def num_lacking(self, num_blocks: int) -> int:
        """Return how many pages are missing until so many blocks are ready."""
        missing = num_blocks - self.num_ready_blocks
        return max(-(-missing // self.geometry.blocks_per_page), 0)

    def promise(self, num_pages: int, *, is_urgent: bool) -> int:
        """Ask for `num_pages` more pages, but for no more than the arena has; return how many came.

        With an urgent wish comes one for spare pages: the next request of a burst finds them here
        and needs no ledger. Pools that share an arena leave them to one another.
        """
        num_left = self.book.num_left
        wanted = min(num_pages, num_left)
        if wanted <= 0:
            return 0
        num_spare = min(self._num_spare_promised, num_left - wanted) if is_urgent else 0
        return self._ask_source(wanted, is_urgent=is_urgent, num_spare=num_spare)

    def cancel(self) -> None:
        """Give back what is promised and was not used."""
        if self.num_promised:
            self._source.cancel(self.num_promised)
            self._count_promised(-self.num_promised)

    def open_blocks(self, num_blocks: int) -> list[int]:
        """Open pages for `num_blocks` more blocks, as far as they are ready; return the pages."""
        per_page = self.geometry.blocks_per_page
        opened: list[int] = []
        while len(opened) * per_page < num_blocks and (page := self.open()) is not None:
            opened.append(page)
        return opened

    def open(self) -> int | None:
        """Open a spare page, else the lowest promised one; return None if there is neither."""
        if self._spare:
            page = self._spare.popleft()
            self.num_ready_blocks -= self.geometry.blocks_per_page
            self.book.need(page)
        elif self.num_promised:
            page = self._take_promised(is_spare=False)
        else:
            return None
        self._add(page)
        return page

    def hold(self, block_ids: Iterable[int], holder: Hashable) -> None:
        """Keep the pages of these blocks mapped until `holder`, a copy of them, has ended.

        Their free blocks may be taken meanwhile.
        """
        ids_per_page = self.geometry.ids_per_page
        self.book.hold({int(block_id) // ids_per_page for block_id in block_ids}, holder)

    def hold_later(self, find_pages: Callable[[], Collection[int]], holder: Hashable) -> None:
        """As `hold`, where to find the pages waits for the device: they are when one is closed."""
        self.book.hold_later(find_pages, holder)

    def num_held_empty(self) -> int:
        """Return how many empty pages only a hold keeps mapped."""
        book = self.book
        return len(book.held_of(self._blocks.empty_pages())) if book.holds else 0

    def close_empty(self, max_pages: int, *, keep: int = 0) -> int:
        """Close up to `max_pages` spare and empty pages, all but `keep`; return how many it was.

        Those that are held are among what is kept.
        """
        empty, spare = self._blocks.empty_pages(), self._spare
        most_pages = len(empty) + len(spare) - keep
        if self.book.holds:
            held = self.book.held_of(empty)
            empty = [page for page in empty if page not in held]
        num_pages = max(min(most_pages, len(empty) + len(spare), max_pages), 0)
        closed = [spare.pop() for _ in range(min(num_pages, len(spare)))]
        self.num_ready_blocks -= len(closed) * self.geometry.blocks_per_page
        self._put_back(closed)
        self.close(empty[: num_pages - len(closed)])
        return num_pages

    def close(self, pages: Sequence[int]) -> None:
        """Close open pages that are empty: their blocks can no longer be taken.

        Raises:
            PageStateError: If one is not empty, or is held.
        """
        if pages:
            if self.book.holds and (held := self.book.held_of(pages)):
                raise PageStateError(f"pages {sorted(held)} cannot be closed: copies are open")
            self._blocks.remove(pages)
            self._open.difference_update(pages)
            self.num_open_blocks -= len(pages) * self.geometry.blocks_per_page
            self._put_back(pages)
            self.on_close(pages)

    def end_schedule(self, *, is_live: bool, is_last: bool = False) -> None:
        """Close surplus pages that are due, have spare ones, and give back what was not used.

        Args:
            is_live: Requests run.
            is_last: Nobody will call again soon, so surplus pages are due now.
        """
        num_empty = self._blocks.num_empty_pages(is_live=is_live) + len(self._spare)
        num_kept = self.max_spare_pages
        if not is_live:
            num_kept = min(num_kept, self.num_quiet_pages)
        if num_empty > num_kept:
            self._close_surplus(num_empty - num_kept, num_kept, is_live=is_live, is_last=is_last)
        else:
            if self._lingering.least:
                self._lingering.note(0)
            # While somebody awaits the rest of what was asked, a spare page would be given for it
            # again and again, and the ask be over with next to nothing given.
            is_awaited = self.book.holds.num_awaited > 0
            if is_live and num_empty < self.min_spare_pages and not is_awaited:
                self._open_spare(self.max_spare_pages - num_empty)
        if self.num_promised:
            self.cancel()

    def seconds_until_due(self) -> float | None:
        """Return when all surplus pages are due, or None if there were none at the last look."""
        return self._lingering.seconds_until_due()

    def _close_surplus(
        self, num_surplus: int, num_kept: int, *, is_live: bool, is_last: bool
    ) -> None:
        lingering = self._lingering
        lingering.note(num_surplus)
        if self.book.holds.num_awaited:
            return  # they are somebody else's as soon as holds have ended
        num_due = num_surplus if is_last else lingering.num_due()
        if not num_due:
            return
        at_most = MAX_CLOSED_PAGES if is_live else num_due
        num_closed = self.close_empty(min(num_due, at_most), keep=num_kept)
        if num_closed < min(num_due, at_most) and not self.book.holds:
            lingering.restart()  # fewer were empty than it seemed
        else:
            lingering.note(num_surplus - num_closed)

    def _open_spare(self, num_pages: int) -> None:
        """Order so many pages to be mapped soon, as far as no neighbour waits for the memory."""
        missing = min(num_pages - self.num_promised, self.book.num_left)
        if missing > 0:
            self._ask_source(0, is_urgent=False, num_spare=missing)
        for _ in range(min(num_pages, self.num_promised)):
            self._spare.append(self._take_promised(is_spare=True))
            self.num_ready_blocks += self.geometry.blocks_per_page

    def _ask_source(self, num_pages: int, *, is_urgent: bool, num_spare: int) -> int:
        granted = self._source.promise(num_pages, is_urgent=is_urgent, num_spare=num_spare)
        self._count_promised(granted)
        return granted

    def _take_promised(self, *, is_spare: bool) -> int:
        self._count_promised(-1)
        page = self.book.take_unmapped()
        if self.book.open(page, is_spare=is_spare):
            self._source.cancel(1)  # it is mapped still
        return page

    def _count_promised(self, num_pages: int) -> None:
        self.num_promised += num_pages
        self.book.num_promised += num_pages
        self.num_ready_blocks += num_pages * self.geometry.blocks_per_page

    def _add(self, page: int) -> None:
        self._open.add(page)
        self.num_open_blocks += self.geometry.blocks_per_page
        self._blocks.add(page)

    def _put_back(self, pages: Sequence[int]) -> None:
        book = self.book
        num_unused = 0  # of which no worker knew
        for page in pages:
            book.put_back(page)
            num_unused += book.close(page)
        if num_unused:
            self._source.cancel(num_unused)
