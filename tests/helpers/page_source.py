"""A ledger of pages for tests, and blocks as a free list knows them."""

from dataclasses import dataclass

from hypothesis import strategies as st
from hypothesis.stateful import rule

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

    @property
    def room_pages(self) -> int:
        """What could be promised."""
        return self.num_left

    def promise(self, num_pages: int, *, is_urgent: bool, num_spare: int = 0) -> int:
        self.wishes.append(is_urgent)
        granted = min(num_pages + num_spare, self.num_left)
        self.num_left -= granted
        self.num_promised += granted
        return granted

    def cancel(self, num_pages: int) -> None:
        assert 0 < num_pages <= self.num_promised
        self.num_left += num_pages
        self.num_promised -= num_pages

    def settle(self, orders: PageOrders | None) -> None:
        """Do what the worker does when it carries out orders."""
        if orders is not None:
            num_mapped = len(orders.map_pages) + len(orders.spare_pages)
            assert num_mapped <= self.num_promised
            self.num_promised -= num_mapped
            self.num_left += len(orders.unmap_pages)


class TakenByNeighbours:
    """What neighbours do in a state machine: take pages of its ledger, and give them back."""

    source: CountingSource
    num_of_neighbours = 0

    @rule(num_pages=st.integers(1, 8))
    def a_neighbour_takes(self, num_pages: int) -> None:
        taken = min(num_pages, self.source.num_left)
        self.source.num_left -= taken
        self.num_of_neighbours += taken

    @rule()
    def the_neighbours_give(self) -> None:
        self.source.num_left += self.num_of_neighbours
        self.num_of_neighbours = 0
