"""Pages under a free list: promised, opened, mapped ahead, and closed when they are empty."""

import pytest
import torch

from kvcached_core.memory.geometry import Geometry
from kvcached_core.memory.orders import PageOrders
from kvcached_sglang.blocks import BlockPages

pytestmark = pytest.mark.sglang

GEOMETRY = Geometry(block_bytes=16, num_planes=4, ids_per_page=33, blocks_per_page=8)


class Source:
    """Promises all that is asked for."""

    def __init__(self) -> None:
        self.num_promised = 0
        self.wishes: list[tuple[int, bool, int]] = []

    def reserve(self, num_pages: int, *, is_urgent: bool, num_spare: int = 0) -> int:
        self.wishes.append((num_pages, is_urgent, num_spare))
        self.num_promised += num_pages + num_spare
        return num_pages + num_spare

    def cancel(self, num_pages: int) -> None:
        self.num_promised -= num_pages


def pages(orders: list[PageOrders], **options: float) -> BlockPages:
    return BlockPages(GEOMETRY, 8, Source(), orders.append, "cpu", **options)  # type: ignore[arg-type]


def test_page_0_is_open_and_its_padding_block_is_nobodys() -> None:
    assert pages([]).all_ids().tolist() == list(range(1, 8))


def test_opened_pages_are_mapped_before_their_ids_are_given() -> None:
    orders: list[PageOrders] = []
    ids = pages(orders).open_blocks(9)
    assert [order.map_pages for order in orders] == [[1, 2]]
    assert ids.tolist() == [*range(33, 41), *range(66, 74)]


def test_a_page_mapped_ahead_is_ready_not_mapped_again() -> None:
    orders: list[PageOrders] = []
    ours = pages(orders, min_spare_pages=1, max_spare_pages=2)
    ours.map_ahead(0)
    assert orders.pop().spare_pages == [1, 2]
    ours.open_blocks(8)
    assert (orders[0].ready_pages, orders[0].map_pages) == ([1], [])


def test_only_empty_pages_are_closed_and_page_0_never() -> None:
    ours = pages([])
    ids = torch.cat((ours.all_ids(), ours.open_blocks(24)))
    left, closed = ours.close(ids[ids != 40], 8)
    assert closed == [2, 3]
    assert left.tolist() == [*range(1, 8), *range(33, 40)]
    assert ours.num_open_pages == 2


def test_surplus_is_due_after_its_time_and_not_before() -> None:
    now = [0.0]
    ours = BlockPages(
        GEOMETRY, 8, Source(), lambda _: None, "cpu", idle_seconds=1.0, clock=lambda: now[0]
    )
    assert not ours.is_surplus_due(16, is_live=False)
    now[0] = 0.9
    assert not ours.is_surplus_due(16, is_live=False)
    now[0] = 1.0
    assert ours.is_surplus_due(16, is_live=False)
    assert not ours.is_surplus_due(8, is_live=False)


def test_the_time_of_surplus_begins_anew_when_there_was_none_in_between() -> None:
    now = [0.0]
    ours = BlockPages(
        GEOMETRY, 8, Source(), lambda _: None, "cpu", idle_seconds=1.0, clock=lambda: now[0]
    )
    assert not ours.is_surplus_due(16, is_live=False)
    now[0] = 0.9
    assert not ours.is_surplus_due(0, is_live=False)
    now[0] = 1.5
    assert not ours.is_surplus_due(16, is_live=False)
    now[0] = 2.5
    assert ours.is_surplus_due(16, is_live=False)


def test_nobody_is_asked_to_give_for_spare_pages_and_others_are_for_what_a_request_needs() -> None:
    source = Source()
    ours = BlockPages(
        GEOMETRY, 8, source, lambda _: None, "cpu", min_spare_pages=1, max_spare_pages=2
    )
    ours.map_ahead(0)
    ours.open_blocks(17)  # two spare pages and another one
    assert source.wishes == [(0, False, 2), (1, True, 0)]


def test_no_more_is_promised_than_the_pool_has() -> None:
    source = Source()
    ours = BlockPages(GEOMETRY, 8, source, lambda _: None, "cpu")
    ours.reserve_blocks(1000)
    ours.reserve_blocks(1000)
    assert ours.num_promised == source.num_promised == 7
    ours.cancel()
    ours.cancel()
    assert ours.num_promised == source.num_promised == 0


def test_two_pools_take_their_pages_from_the_same_ones_and_share_padding_alone() -> None:
    unmapped = list(range(1, 8))
    orders: list[PageOrders] = []
    first, second = (
        BlockPages(GEOMETRY, 8, Source(), orders.append, "cpu", unmapped=unmapped) for _ in range(2)
    )
    assert first.all_ids().tolist() == second.all_ids().tolist() == []
    ids = first.open_blocks(9)
    second.open_blocks(1)
    assert [order.map_pages for order in orders] == [[1, 2], [3]]
    _, closed = first.close(ids, 1)
    assert closed == [2]
    second.open_blocks(8)
    assert orders[-1].map_pages == [2]
    assert (first.num_open_blocks, second.num_open_blocks) == (8, 16)
