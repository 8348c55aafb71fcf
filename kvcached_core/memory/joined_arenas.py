"""Two arenas of one rank as one: their pages are numbered through, those of the first one first."""

from collections.abc import Iterable, Sequence

from kvcached_core.memory.arena import Arena


class JoinedArenas:
    """What the keeper of a rank's pages maps where its pools have an arena each.

    Both have pages of one size, so that a page is a page to the ledger. As with an arena, different
    threads may map and unmap different pages.

    Args:
        first: Its pages keep their numbers.
        second: Its pages come behind; what mapping them takes is counted with the first one's.
    """

    def __init__(self, first: Arena, second: Arena) -> None:
        second.maps, second.unmaps = first.maps, first.unmaps
        self.arenas = (first, second)
        self.backend = first.backend
        self.maps, self.unmaps = first.maps, first.unmaps
        self._num_first = first.num_pages

    @property
    def resident_pages(self) -> list[int]:
        """See `Arena.resident_pages`: the first one's come first."""
        first, second = self.arenas
        return first.resident_pages + [self._num_first + page for page in second.resident_pages]

    def is_resident(self, page: int) -> bool:
        """See `Arena.is_resident`."""
        arena, own_page = self._find(page)
        return arena.is_resident(own_page)

    def map(self, pages: Iterable[int]) -> None:
        """See `Arena.map`: all of them are mapped, or none.

        Raises:
            KVCachedError: As `Arena.map`.
        """
        first, second = self.arenas
        found = [self._find(page) for page in pages]
        of_first = [page for arena, page in found if arena is first]
        first.map(of_first)
        try:
            second.map([page for arena, page in found if arena is second])
        except BaseException:
            first.take_back(of_first)
            raise

    def take_back(self, pages: Sequence[int]) -> None:
        """See `Arena.take_back`."""
        for page in reversed(pages):
            arena, own_page = self._find(page)
            arena.take_back([own_page])

    def unmap(self, pages: Iterable[int]) -> None:
        """See `Arena.unmap`.

        Raises:
            KVCachedError: As `Arena.unmap`.
        """
        for page in pages:
            arena, own_page = self._find(page)
            arena.unmap([own_page])

    def zero(self) -> None:
        """See `Arena.zero`."""
        for arena in self.arenas:
            arena.zero()

    def close(self) -> None:
        """See `Arena.close`."""
        for arena in self.arenas:
            arena.close()

    def _find(self, page: int) -> tuple[Arena, int]:
        first, second = self.arenas
        return (first, page) if page < self._num_first else (second, page - self._num_first)
