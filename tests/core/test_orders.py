"""Orders that no worker was told yet: one for a page, whatever was decided before."""

import pytest

from kvcached_core.memory.orders import PageOrders, PendingOrders


def told(orders: PendingOrders) -> PageOrders:
    return orders.take(0, 0)


def test_each_order_is_told_once_in_the_order_it_came() -> None:
    orders = PendingOrders()
    assert not orders
    assert not orders.open(3, is_spare=False)
    assert not orders.open(1, is_spare=False)
    assert not orders.open(2, is_spare=True)
    assert not orders.close(9)
    assert orders
    expected = PageOrders([3, 1], [], [2], [9], num_used_pages=4, num_cached_pages=5)
    assert orders.take(4, 5) == expected
    assert not orders
    assert told(orders) == PageOrders()


@pytest.mark.parametrize("is_spare", [False, True])
def test_a_page_closed_before_it_was_told_needs_no_order(*, is_spare: bool) -> None:
    orders = PendingOrders()
    orders.open(3, is_spare=is_spare)
    assert orders.close(3)
    assert not orders


@pytest.mark.parametrize(("is_spare", "ready"), [(False, [3]), (True, [])])
def test_a_page_reopened_before_it_went_needs_no_memory(
    *, is_spare: bool, ready: list[int]
) -> None:
    orders = PendingOrders()
    orders.close(3)
    assert orders.open(3, is_spare=is_spare)
    assert told(orders) == PageOrders(ready_pages=ready)


def test_a_spare_page_is_needed_once() -> None:
    orders = PendingOrders()
    orders.open(3, is_spare=True)
    orders.open(4, is_spare=True)
    orders.need(4)
    assert told(orders) == PageOrders(map_pages=[4], spare_pages=[3])
    orders.need(3)
    orders.need(4)
    assert told(orders) == PageOrders(ready_pages=[3])
    orders.need(3)
    assert not orders


def test_a_spare_page_that_went_is_not_needed_any_more() -> None:
    orders = PendingOrders()
    orders.open(3, is_spare=True)
    told(orders)
    orders.need(3)
    assert not orders.close(3)
    assert told(orders) == PageOrders(unmap_pages=[3])
    orders.need(3)
    assert not orders


def test_what_is_done_already_is_not_told() -> None:
    orders = PendingOrders()
    orders.open(0, is_spare=False)
    orders.forget()
    assert not orders
    assert not orders.close(0)
