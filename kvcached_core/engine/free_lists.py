"""The free blocks of a pool's open pages as lists: the next one comes from the fullest page.

So pages empty out. A block of an open page is free, cached or live. A free block is in its page's
list, or in hand. A cached one is in the engine's own queue of blocks that may be evicted, and is
only counted here. A live one is a request's. A page is used while it has a live block, cached while
it has only cached ones beside free ones, and empty while all its blocks are free.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from heapq import heappop, heappush, heapreplace
from typing import Generic, Protocol, TypeVar

from kvcached_core.errors import PageStateError
from kvcached_core.memory.geometry import Geometry

CLOSED, USED, CACHED, EMPTY = range(4)


class HasId(Protocol):
    """What a block is here: an object with its sparse id."""

    block_id: int


Block = TypeVar("Block", bound=HasId)


class FreeLists(Generic[Block]):
    """Which blocks of open pages are free, and what their pages are for. `Blocks` of `Pages`.

    The books of a page are brought up to date when somebody asks for them, not with each block, and
    what comes back is sorted into its pages when the next blocks are taken in hand.

    Args:
        geometry: What lies in a page.
        num_pages: Pages of the arena.
        blocks_of_page: Returns the blocks of a page, in id order; called when it is opened.
    """

    def __init__(
        self,
        geometry: Geometry,
        num_pages: int,
        blocks_of_page: Callable[[int], Sequence[Block]],
    ) -> None:
        self._num_pages = num_pages
        self._ids_per_page = geometry.ids_per_page
        self._blocks_per_page = geometry.blocks_per_page
        self._blocks_of_page = blocks_of_page
        self._lists: list[list[Block]] = [[] for _ in range(num_pages)]
        self._num_listed = 0
        self.in_hand: list[Block] = []  # those that are taken next, the last one first: to be read
        self._page_in_hand = -1  # if they are of one page
        self._returned: list[Block] = []  # those that are not sorted into their pages yet
        # A page whose list has a block is among the new ones or has an entry in the heap, which is
        # (free blocks when entered) * num_pages + page. A page that has none now was closed since.
        self._new: list[int] = []
        self._heap: list[int] = []
        self._entered: set[int] = set()
        self._num_cached = [0] * num_pages
        self._dirty: set[int] = set()  # pages whose books are not up to date
        self._states = [CLOSED] * num_pages
        self._num_in_state = [num_pages, 0, 0, 0]
        self._empty: dict[int, None] = {}  # the longest empty first
        # What an engine calls for single blocks: its own call of a method would cost as much again.
        # Both lists are emptied, and never replaced. `take_in_hand` wants a block in hand.
        self.take_in_hand: Callable[[], Block] = self.in_hand.pop
        self.give_one: Callable[[Block], None] = self._returned.append

    @property
    def num_free(self) -> int:
        """Blocks that can be taken."""
        return self._num_listed + len(self.in_hand) + len(self._returned)

    def num_empty_pages(self, *, is_live: bool) -> int:
        """See `Blocks.num_empty_pages`: while requests are live, those in hand are not counted."""
        if not is_live:
            self._settle_all()
        elif self._dirty or self._returned:
            self._settle()
        return len(self._empty)

    def add(self, page: int) -> None:
        """See `Blocks.add`."""
        blocks = self._blocks_of_page(page)
        self._lists[page] = [*reversed(blocks)]
        self._num_listed += len(blocks)
        self._new.append(page)
        self._enter_state(page, EMPTY)

    def remove(self, pages: Sequence[int]) -> None:
        """See `Blocks.remove`."""
        self._settle_all()
        for page in pages:
            if self._states[page] != EMPTY:
                raise PageStateError(f"page {page} cannot be closed: it is not empty")
            self._enter_state(page, CLOSED)
            self._num_listed -= len(self._lists[page])
            self._lists[page] = []

    def empty_pages(self) -> list[int]:
        """See `Blocks.empty_pages`: the one that is empty for longest first."""
        self._settle_all()
        return list(self._empty)

    def count_pages(self) -> tuple[int, int]:
        """See `Blocks.count_pages`."""
        self._settle_all()
        return self._num_in_state[USED], self._num_in_state[CACHED]

    def pages_in(self, state: int) -> list[int]:
        """Return the pages that are in `state`, in ascending order."""
        self._settle_all()
        return [page for page, current in enumerate(self._states) if current == state]

    def take_one(self) -> Block | None:
        """Return a free block, or None if there is none."""
        return self.take_in_hand() if self.in_hand or self.fill_hand() else None

    def take(self, num_blocks: int) -> list[Block]:
        """Return up to `num_blocks` free blocks."""
        taken: list[Block] = []
        while len(taken) < num_blocks and (self.in_hand or self.fill_hand()):
            count = min(num_blocks - len(taken), len(self.in_hand))
            taken.extend(reversed(self.in_hand[-count:]))
            del self.in_hand[-count:]
        return taken

    def give(self, blocks: Iterable[Block]) -> None:
        """Put blocks that hold nothing any more back."""
        self._returned.extend(blocks)

    def add_cached(self, blocks: Iterable[Block]) -> None:
        """Count blocks that only the prefix cache wants now: those of requests that ended."""
        num_cached, ids_per_page, mark_dirty = self._num_cached, self._ids_per_page, self._dirty.add
        for block in blocks:
            page = block.block_id // ids_per_page
            num_cached[page] += 1
            mark_dirty(page)

    def remove_cached(self, blocks: Iterable[Block]) -> None:
        """Count blocks that a request has now, or that are given: those left the cache's queue."""
        num_cached, ids_per_page, mark_dirty = self._num_cached, self._ids_per_page, self._dirty.add
        for block in blocks:
            page = block.block_id // ids_per_page
            num_cached[page] -= 1
            mark_dirty(page)

    def cached_pages(
        self,
        queue: Iterable[Block],
        is_copied: Callable[[Block], bool] | None = None,
        left_out: Collection[int] = (),
    ) -> Iterator[list[Block]]:
        """Yield the blocks of each cached page, the page that was unused for longest first.

        A page comes when its youngest block does. Whoever wants few pages of a large cache walks
        only a part of it.

        Args:
            queue: The blocks that only the prefix cache wants, the oldest first. Those that were
                yielded may leave it: the ones that come next are on other pages.
            is_copied: Returns whether a block has a copy elsewhere. Pages on which one has none
                come last; to find that out may take a walk through the whole queue.
            left_out: Pages that do not come.
        """
        pages = (page for page in self.pages_in(CACHED) if page not in left_out)
        seen: dict[int, list[Block]] = {page: [] for page in pages}
        last = []
        for block in queue:
            page = block.block_id // self._ids_per_page
            blocks = seen.get(page)
            if blocks is not None:
                blocks.append(block)
                if len(blocks) == self._num_cached[page]:
                    if is_copied is None or all(map(is_copied, blocks)):
                        yield blocks
                    else:
                        last.append(blocks)
        yield from last

    def fill_hand(self) -> bool:
        """Take the fullest page's blocks in hand, which is empty; return whether there are any.

        What came back since to the page that was in hand is taken first: it was the fullest.
        """
        in_hand = self.in_hand
        if self._returned:
            self._sort(self._page_in_hand)
        if not in_hand:
            self._take_fullest()
        self._num_listed -= len(in_hand)
        return bool(in_hand)

    def _take_fullest(self) -> None:
        """Move the fullest page's blocks from its list to the hand.

        No page can be fuller than those with one free block, so all that are new go together.
        """
        in_hand, lists, heap, entered = self.in_hand, self._lists, self._heap, self._entered
        num_pages, mark_dirty = self._num_pages, self._dirty.add
        has_singles = self._blocks_per_page > 1
        for page in self._new:
            free = lists[page]
            if has_singles and len(free) == 1:
                in_hand.append(free.pop())
                mark_dirty(page)
            elif free and page not in entered:
                heappush(heap, len(free) * num_pages + page)
                entered.add(page)
        self._new.clear()
        self._page_in_hand = -1
        while heap and not in_hand:
            entered_with, page = divmod(heap[0], num_pages)
            num_free = len(lists[page])
            if num_free > entered_with:
                heapreplace(heap, num_free * num_pages + page)
                continue
            heappop(heap)
            entered.remove(page)
            if num_free:  # otherwise it was closed
                in_hand.extend(lists[page])
                lists[page].clear()
                mark_dirty(page)
                self._page_in_hand = page

    def _sort(self, page_in_hand: int = -1) -> None:
        """Put what came back into the lists of its pages, or in hand: what is on the page there."""
        lists, ids_per_page, last_page = self._lists, self._ids_per_page, -1
        free: list[Block] = []
        for block in self._returned:
            page = block.block_id // ids_per_page
            if page != last_page:  # most come in runs
                last_page = page
                if page == page_in_hand:
                    free = self.in_hand
                else:
                    free = lists[page]
                    self._dirty.add(page)
                    if not free:
                        self._new.append(page)
            free.append(block)
        self._num_listed += len(self._returned)
        self._returned.clear()

    def _settle(self) -> None:
        """Bring the books up to date, but for what is in hand: those pages count as used."""
        if self._returned:
            self._sort()
        if not self._dirty:
            return
        blocks_per_page, lists, num_cached = self._blocks_per_page, self._lists, self._num_cached
        states = self._states
        for page in self._dirty:
            num_free = len(lists[page])
            if num_free == blocks_per_page:
                state = EMPTY
            elif num_free + num_cached[page] == blocks_per_page:
                state = CACHED
            else:
                state = USED
            if states[page] != state:
                self._enter_state(page, state)
        self._dirty.clear()

    def _settle_all(self) -> None:
        """Bring all books up to date: what is in hand goes back to its pages."""
        self.give(self.in_hand)
        self.in_hand.clear()
        self._settle()

    def _enter_state(self, page: int, state: int) -> None:
        old = self._states[page]
        self._num_in_state[old] -= 1
        self._num_in_state[state] += 1
        self._states[page] = state
        if state == EMPTY:
            self._empty[page] = None
        elif old == EMPTY:
            del self._empty[page]
