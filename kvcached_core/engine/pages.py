"""Which page the next block comes from, and which page goes back.

The scheduler's half of the memory: it decides, the workers map and unmap. It holds the engine's
block objects without looking into them, so every engine's allocator can stand on it.

A block of a resident page is in one of three places: in its page's free list here, in the engine's
own queue of cached blocks (evictable), or with a request (live). A page is *used* while it has a
live block, *cached* while it has only evictable ones, and *idle* while all its blocks are free.
"""

import time
from collections.abc import Callable, Iterable
from heapq import heappop, heappush
from itertools import islice
from typing import Generic, Protocol, TypeVar

from kvcached_core.errors import PageStateError
from kvcached_core.memory.geometry import Geometry
from kvcached_core.memory.orders import PageOrders, PendingOrders

Block = TypeVar("Block")

UNMAPPED, USED, CACHED, IDLE = range(4)

# Pages that one schedule gives back while requests are live: no step pays for a whole burst.
MAX_CLOSED_PAGES = 8

# Idle pages that stay when no request is live; with page 0 they are what a quiet engine holds.
NUM_QUIET_PAGES = 1

# How often the counts alone are told while requests are live; every report takes the ledger's lock
# in front of a step.
REPORT_SECONDS = 0.05


class PageSource(Protocol):
    """Who promises pages: the ledger, for all devices of the instance at once."""

    def reserve(self, num_pages: int, *, is_urgent: bool, num_spare: int = 0) -> int:
        """Promise up to `num_pages` pages, and up to `num_spare` more; return how many it is.

        Only an urgent wish, one without which a request has to wait, may make others give memory;
        the spare ones never do, and are left to who waits for memory.
        """

    def cancel(self, num_pages: int) -> None:
        """Take back a promise of `num_pages` pages that nobody mapped."""


class PagePool(Generic[Block]):
    """The pages of one pool and the free blocks on them.

    `free_lists`, `num_evictable`, `dirty` and `current` are open to the engine's allocator, which
    takes and gives single blocks on its hot path: whoever moves a block of a page adds the page to
    `dirty`, and the books are brought up to date when somebody asks.

    Args:
        geometry: What lies in a page.
        num_pages: Pages of the pool's virtual size.
        source: Who promises pages.
        blocks_of_page: Returns the blocks of a page, in id order; called when it becomes resident.
        min_spare_pages: While requests are live and fewer pages are idle, pages are mapped ahead of
            need (low watermark) ...
        max_spare_pages: ... until so many are idle; what is above goes back (high watermark).
        num_resident_pages: Pages, from 0 on, that are mapped already.
        idle_seconds: How long a page above the high watermark stays idle before it goes back: the
            next request may want it.
        clock: Returns seconds; for tests.
    """

    def __init__(
        self,
        geometry: Geometry,
        num_pages: int,
        source: PageSource,
        blocks_of_page: Callable[[int], list[Block]],
        *,
        min_spare_pages: int = 0,
        max_spare_pages: int = 0,
        num_resident_pages: int = 0,
        idle_seconds: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.geometry = geometry
        self.num_pages = num_pages
        self.min_spare_pages = min_spare_pages
        self.max_spare_pages = max(max_spare_pages, min_spare_pages)
        self._idle_seconds = idle_seconds
        self._clock = clock
        self._source = source
        self._blocks_of_page = blocks_of_page
        self.free_lists: list[list[Block]] = [[] for _ in range(num_pages)]
        self.num_evictable = [0] * num_pages
        self.num_free = 0
        self.dirty: set[int] = set()
        self.current: list[Block] = []
        self._current_page: int | None = None
        self._num_current = 0  # free blocks of the current page when its books were up to date
        self._unmapped = list(range(num_pages))
        self._states = [UNMAPPED] * num_pages
        self._num_in_state = [num_pages, 0, 0, 0]
        self._idle: dict[int, float] = {}  # since when, the longest idle first
        # Pages with free blocks as (free blocks when entered, page). Only the current page loses
        # free blocks, so an entry never has too many: see _fullest. Entries of closed pages stay
        # until they come up; `_entered` says which pages have a valid one.
        self._by_fullness: list[tuple[int, int]] = []
        self._entered: set[int] = set()
        self._orders = PendingOrders()
        self._reported = (0, 0)
        self._reported_at: float | None = None
        self.num_promised = num_resident_pages
        for _ in range(num_resident_pages):
            self.open()
        self._orders.forget()

    @property
    def num_resident_pages(self) -> int:
        """Pages that are mapped, or will be before the next step runs."""
        return self.num_pages - self._num_in_state[UNMAPPED]

    @property
    def num_resident_blocks(self) -> int:
        """Blocks on these pages."""
        return self.num_resident_pages * self.geometry.blocks_per_page

    @property
    def num_promised_blocks(self) -> int:
        """Blocks on pages that are promised but not resident yet."""
        return self.num_promised * self.geometry.blocks_per_page

    def pages_in(self, state: int) -> list[int]:
        """Return the pages that are in `state`, in ascending order."""
        self._settle()
        return [page for page, current in enumerate(self._states) if current == state]

    def reserve_blocks(self, num_blocks: int, *, is_urgent: bool = False) -> int:
        """Ask for the pages of `num_blocks` more blocks; return how many blocks were promised.

        With an urgent wish comes one for spare pages: the next request of a burst finds them here
        and needs no ledger.
        """
        wanted = -(-num_blocks // self.geometry.blocks_per_page)
        num_left = len(self._unmapped) - self.num_promised
        wanted = min(wanted, num_left)
        if wanted <= 0:
            return 0
        num_spare = min(self.max_spare_pages, num_left - wanted) if is_urgent else 0
        granted = self._source.reserve(wanted, is_urgent=is_urgent, num_spare=num_spare)
        self.num_promised += granted
        return granted * self.geometry.blocks_per_page

    def take(self, num_blocks: int) -> list[Block]:
        """Return up to `num_blocks` free blocks, from the fullest page first.

        Where the resident pages have too few, promised ones become resident. What is missing then
        has to come from evicting cached blocks.
        """
        taken: list[Block] = []
        while len(taken) < num_blocks and (self.current or self._turn_to_next_page()):
            count = min(num_blocks - len(taken), len(self.current))
            taken.extend(reversed(self.current[-count:]))
            del self.current[-count:]
        self.num_free -= len(taken)
        return taken

    def take_from(self, page: int) -> Block:
        """Take the first free block of a resident page: for blocks an engine never gives back."""
        self.dirty.add(page)
        self.num_free -= 1
        return self.free_lists[page].pop()

    def give(self, page: int, blocks: Iterable[Block]) -> None:
        """Put blocks that hold nothing any more back on their page."""
        before = len(self.free_lists[page])
        self.free_lists[page].extend(blocks)
        self.num_free += len(self.free_lists[page]) - before
        self.dirty.add(page)

    def open(self, *, is_spare: bool = False) -> int:
        """Make the lowest promised page resident and return it.

        Args:
            is_spare: No step needs it yet, so it may be mapped behind the next ones.
        """
        page = heappop(self._unmapped)
        self.num_promised -= 1
        self._enter_state(page, IDLE)
        if self._orders.open(page, is_spare=is_spare):
            self._source.cancel(1)
        blocks = self._blocks_of_page(page)
        self.free_lists[page] = blocks[::-1]
        self.num_free += len(blocks)
        self.dirty.add(page)
        return page

    def close(self, page: int) -> None:
        """Give an idle page back: its blocks can no longer be taken."""
        self._settle()
        if self._states[page] != IDLE:
            raise PageStateError(f"page {page} cannot be closed: it is not idle")
        self._enter_state(page, UNMAPPED)
        self.num_free -= len(self.free_lists[page])
        self.free_lists[page] = []
        if page == self._current_page:
            self._leave_current_page()
        self._entered.discard(page)
        heappush(self._unmapped, page)
        if self._orders.close(page):
            self._source.cancel(1)

    def close_idle(self, max_pages: int, *, keep: int = 0) -> int:
        """Close up to `max_pages` idle pages, the longest idle first; return how many it was."""
        self._settle()
        num_pages = min(max(len(self._idle) - keep, 0), max_pages)
        for page in list(islice(self._idle, num_pages)):
            self.close(page)
        return num_pages

    def drain(self, *, is_last: bool = False) -> PageOrders | None:
        """Return the orders since the last call, or None if there is nothing to tell.

        Closes idle pages above the high watermark when they are due, opens spare ones below the low
        watermark while requests are live, and takes back what was promised and not used.

        Args:
            is_last: Nobody will call again soon, so idle pages are due now.
        """
        self._settle()
        num_idle, is_live, num_kept = len(self._idle), self._is_live, self._num_kept
        if num_idle > num_kept:
            at_most = MAX_CLOSED_PAGES if is_live else num_idle
            num_due = num_idle if is_last else self._num_due_pages(at_most)
            if num_due:
                self.close_idle(num_due, keep=num_kept)
        elif num_idle < self.min_spare_pages and is_live:
            self._open_spare(self.max_spare_pages - num_idle)
        if self.num_promised:
            self._source.cancel(self.num_promised)
            self.num_promised = 0
        counts = self._num_in_state[USED], self._num_in_state[CACHED]
        has_pages = bool(self._orders)
        if not has_pages and counts == self._reported:
            return None
        now, before = self._clock(), self._reported_at
        if not has_pages and is_live and before is not None and now < before + REPORT_SECONDS:
            return None
        self._reported_at, self._reported = now, counts
        return self._orders.take(*counts)

    def seconds_until_due(self) -> float | None:
        """Return when the last of the surplus idle pages is due, or None if there is none."""
        self._settle()
        num_surplus = len(self._idle) - self._num_kept
        if num_surplus <= 0:
            return None
        since = list(self._idle.values())[num_surplus - 1]
        return max(since + self._idle_seconds - self._clock(), 0.0)

    @property
    def _is_live(self) -> bool:
        return self._num_in_state[USED] > 1  # page 0 always counts: it holds the null block

    @property
    def _num_kept(self) -> int:
        return self.max_spare_pages if self._is_live else min(self.max_spare_pages, NUM_QUIET_PAGES)

    def _num_due_pages(self, at_most: int) -> int:
        latest = self._clock() - self._idle_seconds
        num_due = 0
        for since in self._idle.values():
            if since > latest or num_due == at_most:
                break
            num_due += 1
        return num_due

    def _open_spare(self, num_pages: int) -> None:
        missing = min(num_pages, len(self._unmapped)) - self.num_promised
        if missing > 0:
            self.num_promised += self._source.reserve(0, is_urgent=False, num_spare=missing)
        for _ in range(min(num_pages, self.num_promised)):
            self.open(is_spare=True)
        self._settle()

    def _turn_to_next_page(self) -> bool:
        self._leave_current_page()
        self._settle()
        page = self._fullest()
        if page is None:
            if not self.num_promised:
                return False
            page = self.open()
        self._entered.discard(page)
        self._orders.need(page)
        self._current_page = page
        self.current = self.free_lists[page]
        self._num_current = len(self.current)
        return True

    def _leave_current_page(self) -> None:
        if self._current_page is not None:
            self.dirty.add(self._current_page)
        self._current_page = None
        self.current = []

    def _fullest(self) -> int | None:
        heap, entered = self._by_fullness, self._entered
        while heap:
            entered_with, page = heappop(heap)
            if page not in entered:
                continue
            num_free = len(self.free_lists[page])
            if num_free == entered_with:
                return page
            heappush(heap, (num_free, page))
        return None

    def _settle(self) -> None:
        current = self._current_page
        if current is not None and len(self.current) != self._num_current:
            self.dirty.add(current)
            self._num_current = len(self.current)
        if not self.dirty:
            return
        blocks_per_page = self.geometry.blocks_per_page
        states, entered = self._states, self._entered
        for page in self.dirty:
            num_free = len(self.free_lists[page])
            if num_free == blocks_per_page:
                state = IDLE
            elif num_free + self.num_evictable[page] == blocks_per_page:
                state = CACHED
            else:
                state = USED
            if states[page] != state and states[page] != UNMAPPED:
                self._enter_state(page, state)
            if num_free and page != current and page not in entered:
                heappush(self._by_fullness, (num_free, page))
                entered.add(page)
        self.dirty.clear()

    def _enter_state(self, page: int, state: int) -> None:
        old = self._states[page]
        self._num_in_state[old] -= 1
        self._num_in_state[state] += 1
        self._states[page] = state
        if state == IDLE:
            self._idle[page] = self._clock()
        elif old == IDLE:
            del self._idle[page]
