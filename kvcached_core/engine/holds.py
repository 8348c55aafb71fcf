"""Pages that stay mapped because a copy of one of their blocks is open, or may still be begun.

An engine that keeps copies of its cache in a second tier begins to copy a block after its request
has ended. A page of it is empty by then, and could be unmapped under the copy.
"""

from collections.abc import Callable, Collection, Hashable


class Holds:
    """Which pages of a rank's arenas are held, and by whom. The scheduler's thread calls it.

    Who holds is a copy, by whatever name its engine has for it. What was freed since the engine
    last made copies is held as well: some of it may be copied with the next ones.

    Attributes:
        has_ended: Whether a hold has ended since somebody last set this to False.
        num_awaited: Pages that somebody has asked for or is owed, and that only holds keep. Until
            they went, empty pages go nowhere else.
    """

    def __init__(self) -> None:
        self.has_ended = False
        self.num_awaited = 0
        self._num_holders: dict[int, int] = {}  # of a page
        self._pages_of: dict[Hashable, set[int]] = {}
        self._later: dict[Hashable, list[Callable[[], Collection[int]]]] = {}
        # A pool's freed ids, its ids per page, and the number of its page 0.
        self._freed: list[tuple[list[int], int, int]] = []
        self._freed_pages: set[int] = set()

    def __bool__(self) -> bool:
        is_held = self._num_holders or self._later or self._freed_pages
        return bool(is_held or any(ids for ids, _, _ in self._freed))

    @property
    def is_due(self) -> bool:
        """Whether some of what is awaited may go now."""
        return self.num_awaited > 0 and self.has_ended

    @property
    def num_holders(self) -> int:
        """Copies that are open."""
        return len(self._pages_of.keys() | self._later.keys())

    def freed_ids(self, ids_per_page: int, first_page: int = 0) -> list[int]:
        """Return the list to which a pool adds the ids of blocks that are freed.

        It is emptied, and never replaced.
        """
        ids: list[int] = []
        self._freed.append((ids, ids_per_page, first_page))
        return ids

    def hold(self, pages: Collection[int], holder: Hashable) -> None:
        """Let `holder` have pages, beside those that it has."""
        held, num_holders = self._pages_of.setdefault(holder, set()), self._num_holders
        for page in set(pages) - held:
            num_holders[page] = num_holders.get(page, 0) + 1
            held.add(page)

    def hold_later(self, find_pages: Callable[[], Collection[int]], holder: Hashable) -> None:
        """As `hold`, with pages that are found when somebody looks.

        That is for an engine which would have to wait for its device to find them.
        """
        self._later.setdefault(holder, []).append(find_pages)

    def release(self, holder: Hashable) -> None:
        """Let go of all pages of `holder`; of who has none, of none."""
        num_holders = self._num_holders
        self.has_ended |= self._later.pop(holder, None) is not None
        for page in self._pages_of.pop(holder, ()):
            num_holders[page] -= 1
            if not num_holders[page]:
                del num_holders[page]
            self.has_ended = True

    def settle(self) -> None:
        """Let go of what was freed: who copies some of it holds it by now."""
        for ids, _, _ in self._freed:
            if ids:
                self.has_ended = True
                ids.clear()
        self.has_ended |= bool(self._freed_pages)
        self._freed_pages.clear()

    def drop(self) -> None:
        """Let go of everything: no copy is open, and none will be begun of what was freed."""
        for holder in [*self._later, *self._pages_of]:
            self.release(holder)
        self.settle()

    def held_of(self, pages: Collection[int]) -> set[int]:
        """Return which of these pages are held."""
        for holder in list(self._later) if pages else ():
            for find_pages in self._later.pop(holder):
                self.hold(find_pages(), holder)
        for ids, ids_per_page, first_page in self._freed:
            self._freed_pages.update(first_page + block_id // ids_per_page for block_id in ids)
            ids.clear()
        return {page for page in pages if page in self._num_holders or page in self._freed_pages}
