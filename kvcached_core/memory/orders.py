"""What the scheduler's side tells the workers' side to do with pages."""

from dataclasses import dataclass, field

MAP, READY, SPARE, UNMAP = range(4)


@dataclass
class PageOrders:
    """What the workers shall do, and what the pages are for once they did it.

    Attributes:
        map_pages: Pages to map before the step.
        ready_pages: Pages that the step needs and that an earlier order named as spare.
        spare_pages: Pages to map soon; no step uses them yet.
        unmap_pages: Pages to unmap after the step.
        num_used_pages: Resident pages that hold a block of a live request.
        num_cached_pages: Resident pages that hold only cached blocks.
    """

    map_pages: list[int] = field(default_factory=list)
    ready_pages: list[int] = field(default_factory=list)
    spare_pages: list[int] = field(default_factory=list)
    unmap_pages: list[int] = field(default_factory=list)
    num_used_pages: int = 0
    num_cached_pages: int = 0


class PendingOrders:
    """What was decided since the workers were told: at most one order for a page."""

    def __init__(self) -> None:
        self.kinds: dict[int, int] = {}
        self._unready: set[int] = set()  # ordered as spare, and no step has needed them yet

    def __bool__(self) -> bool:
        return bool(self.kinds)

    def open(self, page: int, *, is_spare: bool) -> bool:
        """Order `page` to be there; return whether it is mapped still, so needs no memory.

        Args:
            page: The page.
            is_spare: No step needs it yet, so it may be mapped behind the next ones.
        """
        if is_spare:
            self._unready.add(page)
        is_mapped = self.kinds.pop(page, None) == UNMAP
        if not is_mapped:
            self.kinds[page] = SPARE if is_spare else MAP
        elif not is_spare:
            self.kinds[page] = READY
        return is_mapped

    def need(self, page: int) -> None:
        """Let the next step have `page`, which is open, if it was ordered as spare."""
        if page in self._unready:
            self._unready.remove(page)
            is_told = self.kinds.pop(page, None) != SPARE
            self.kinds[page] = READY if is_told else MAP

    def close(self, page: int) -> bool:
        """Order `page` to go; return whether no worker knew of it, so its promise is not used."""
        self._unready.discard(page)
        is_unknown = self.kinds.pop(page, None) in (MAP, SPARE)
        if not is_unknown:
            self.kinds[page] = UNMAP
        return is_unknown

    def take(self, num_used_pages: int, num_cached_pages: int) -> PageOrders:
        """Return the orders, which the workers are told now."""
        orders = PageOrders(num_used_pages=num_used_pages, num_cached_pages=num_cached_pages)
        of_kind = orders.map_pages, orders.ready_pages, orders.spare_pages, orders.unmap_pages
        for page, kind in self.kinds.items():
            of_kind[kind].append(page)
        self.kinds.clear()
        return orders

    def forget(self) -> None:
        """Take for done what was ordered so far."""
        self.kinds.clear()
