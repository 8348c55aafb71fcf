"""A ledger of pages for tests, and blocks as a free list knows them."""

from dataclasses import dataclass

from kvcached_core.memory.orders import PageOrders


@dataclass(frozen=True)
class FakeBlock:
    """A block with nothing but its id."""

    block_id: int


class CountingSource:
    """A ledger with a fixed number of pages; it knows what it promised and what was mapped."""

    def __init__(self, num_pages: int) -> None:
        self.num_left = num_pages
        self.num_promised = 0
        self.wishes: list[bool] = []

    def promise(self, num_pages: int, *, is_urgent: bool, num_spare: int = 0) -> int:
        self.wishes.append(is_urgent)
        granted = min(num_pages + num_spare, self.num_left)
        self.num_left -= granted
        self.num_promised += granted
        return granted

    def cancel(self, num_pages: int) -> None:
        assert num_pages <= self.num_promised
        self.num_left += num_pages
        self.num_promised -= num_pages

    def settle(self, orders: PageOrders | None) -> None:
        """Do what the worker does when it carries out orders."""
        if orders is not None:
            num_mapped = len(orders.map_pages) + len(orders.spare_pages)
            assert num_mapped <= self.num_promised
            self.num_promised -= num_mapped
            self.num_left += len(orders.unmap_pages)
