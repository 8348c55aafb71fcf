"""Which page the next block comes from, and which page goes back."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvcached_core.engine.pages import (
    CACHED,
    IDLE,
    MAX_CLOSED_PAGES,
    REPORT_SECONDS,
    UNMAPPED,
    USED,
    PagePool,
)
from kvcached_core.errors import PageStateError
from kvcached_core.memory.geometry import Geometry
from kvcached_core.memory.orders import PageOrders

GEOMETRY = Geometry(block_bytes=1024, num_planes=4, ids_per_page=16, blocks_per_page=4)
NUM_PAGES = 6

# A page of another number than is there would be one of these, less one, under a second name.
NUMBERS_OF_PAGES = [7, 8, 15, 16, 31, 33]


class CountingSource:
    """A ledger with a fixed number of pages; it knows what it promised and what was mapped."""

    def __init__(self, num_pages: int) -> None:
        self.num_left = num_pages
        self.num_promised = 0
        self.wishes: list[bool] = []

    def reserve(self, num_pages: int, *, is_urgent: bool, num_spare: int = 0) -> int:
        self.wishes.append(is_urgent)
        granted = min(num_pages + num_spare, self.num_left)
        self.num_left -= granted
        self.num_promised += granted
        return granted

    def cancel(self, num_pages: int) -> None:
        assert num_pages <= self.num_promised
        self.num_left += num_pages
        self.num_promised -= num_pages

    def settle(self, num_mapped: int, num_unmapped: int) -> None:
        """Do what the worker does when it carries out orders."""
        assert num_mapped <= self.num_promised
        self.num_promised -= num_mapped
        self.num_left += num_unmapped


def make(num_pages: int = NUM_PAGES, left: int = NUM_PAGES, **options: Any) -> PagePool[int]:
    per_page = GEOMETRY.blocks_per_page
    return PagePool(
        GEOMETRY,
        num_pages,
        CountingSource(left),
        lambda page: [GEOMETRY.block_id(page * per_page + index) for index in range(per_page)],
        **options,
    )


def grow(pool: PagePool[int], num_blocks: int) -> list[int]:
    pool.reserve_blocks(num_blocks - pool.num_free)
    return pool.take(num_blocks)


def give(pool: PagePool[int], blocks: list[int]) -> None:
    for block in blocks:
        pool.give(GEOMETRY.page_of(block), [block])


def test_blocks_come_in_id_order_from_the_lowest_page() -> None:
    assert grow(make(), 6) == [0, 1, 2, 3, 16, 17]


def test_the_next_block_comes_from_the_fullest_page() -> None:
    pool = make()
    blocks = grow(pool, 16)
    give(pool, [blocks[0], blocks[1], blocks[2]])  # page 0: one live
    give(pool, [blocks[5]])  # page 1: three live
    give(pool, [blocks[8], blocks[9]])  # page 2: two live
    assert [GEOMETRY.page_of(pool.take(1)[0]) for _ in range(6)] == [1, 2, 2, 0, 0, 0]


def test_a_page_that_was_full_once_and_emptied_since_is_not_the_fullest() -> None:
    pool = make()
    blocks = grow(pool, 16)
    give(pool, [blocks[4]])
    assert pool.pages_in(USED) == [0, 1, 2, 3]  # page 1 is known with one free block
    give(pool, [blocks[5], blocks[6]])
    give(pool, [blocks[0], blocks[1]])
    assert [GEOMETRY.page_of(block) for block in pool.take(3)] == [0, 0, 1]


def test_the_page_that_is_idle_longest_goes_first() -> None:
    pool = make()
    blocks = grow(pool, 16)
    for page in (2, 0, 1):
        give(pool, blocks[4 * page : 4 * page + 4])
        assert page in pool.pages_in(IDLE)
    assert pool.close_idle(2) == 2
    assert pool.pages_in(IDLE) == [1]


def test_counts_alone_are_told_seldom_while_requests_are_live_and_at_once_behind_them() -> None:
    now = [0.0]
    pool = make(max_spare_pages=4, clock=lambda: now[0], num_resident_pages=1)
    pool.take_from(0)
    first, second = grow(pool, 7), grow(pool, 4)
    assert (orders := pool.drain()) is not None
    assert orders.num_used_pages == 3
    give(pool, second)
    assert pool.drain() is None
    now[0] = REPORT_SECONDS
    assert (orders := pool.drain()) is not None
    assert orders == PageOrders(num_used_pages=2)
    give(pool, first)
    assert (orders := pool.drain()) is not None
    assert orders.num_used_pages == 1


def test_emptied_pages_go_back_and_keep_the_spare_one() -> None:
    pool = make(max_spare_pages=1)
    blocks = grow(pool, 12)
    assert (orders := pool.drain()) is not None
    assert (orders.map_pages, orders.unmap_pages) == ([0, 1, 2], [])
    give(pool, blocks)
    assert (orders := pool.drain()) is not None
    assert len(orders.unmap_pages) == 2
    assert len(pool.pages_in(IDLE)) == 1


def test_a_burst_goes_back_a_few_pages_at_a_time_while_requests_are_live() -> None:
    pool = make(40, 40)
    live, burst = grow(pool, 8), grow(pool, 100)
    pool.drain()
    give(pool, burst)
    num_closed = []
    while step := pool.drain():
        num_closed.append(len(step.unmap_pages))
    assert num_closed == [MAX_CLOSED_PAGES] * 3 + [1]
    give(pool, live)
    orders = pool.drain()
    assert orders is not None
    assert len(orders.unmap_pages) == 2


def test_idle_pages_stay_a_while_for_the_next_request() -> None:
    now = [0.0]
    pool = make(idle_seconds=2.0, clock=lambda: now[0], num_resident_pages=1)
    null_block = pool.take_from(0)
    live, dropped = grow(pool, 8), grow(pool, 8)
    pool.drain()
    give(pool, dropped)
    pool.drain()
    emptied = pool.pages_in(IDLE)
    assert len(emptied) == 2
    now[0] = 1.9
    assert (orders := pool.drain()) is None or not orders.unmap_pages
    now[0] = 2.0
    assert (orders := pool.drain()) is not None
    assert sorted(orders.unmap_pages) == emptied
    give(pool, live)
    pool.drain()
    assert len(pool.pages_in(IDLE)) == 2
    assert pool.seconds_until_due() == 2.0
    assert (orders := pool.drain(is_last=True)) is not None
    assert pool.pages_in(IDLE) == []
    assert pool.pages_in(USED) == [GEOMETRY.page_of(null_block)]
    assert pool.seconds_until_due() is None


def test_a_quiet_pool_keeps_one_idle_page_of_its_spare_ones() -> None:
    now = [0.0]
    pool = make(
        min_spare_pages=2,
        max_spare_pages=4,
        idle_seconds=1.0,
        clock=lambda: now[0],
        num_resident_pages=1,
        num_pages=8,
        left=8,
    )
    pool.take_from(0)
    live = grow(pool, 8)
    pool.drain()
    assert len(pool.pages_in(IDLE)) == 4
    give(pool, live)
    now[0] = 0.5
    pool.drain()
    assert len(pool.pages_in(IDLE)) == 6
    assert pool.seconds_until_due() == 1.0
    now[0] = 1.5
    pool.drain()
    assert len(pool.pages_in(IDLE)) == 1


def test_a_spare_page_is_mapped_ahead_while_requests_run_and_not_otherwise() -> None:
    pool = make(min_spare_pages=1, num_resident_pages=1)
    pool.take_from(0)
    assert (orders := pool.drain()) is not None
    assert orders.map_pages == []
    grow(pool, 4)
    assert (orders := pool.drain()) is not None
    assert (orders.map_pages, orders.spare_pages) == ([1], [2])
    assert (orders.num_used_pages, pool.pages_in(IDLE)) == (2, [2])


def test_a_spare_page_is_named_again_when_a_step_needs_it() -> None:
    pool = make(min_spare_pages=1, num_resident_pages=1)
    pool.take_from(0)
    grow(pool, 4)
    pool.drain()
    grow(pool, 4)
    assert (orders := pool.drain()) is not None
    assert (orders.map_pages, orders.ready_pages, orders.spare_pages) == ([], [2], [3])


def test_spare_pages_are_opened_up_to_the_high_watermark_when_they_fall_below_the_low_one() -> None:
    pool = make(16, 16, min_spare_pages=2, max_spare_pages=4, num_resident_pages=1)
    pool.take_from(0)
    num_spare = []
    for _ in range(6):
        grow(pool, 4)
        orders = pool.drain()
        num_spare.append(len(orders.spare_pages) if orders else 0)
    assert num_spare == [4, 0, 0, 3, 0, 0]


def test_a_spare_page_that_was_closed_and_opened_again_is_made_sure_of() -> None:
    pool = make(min_spare_pages=1, num_resident_pages=1)
    pool.take_from(0)
    grow(pool, 4)
    pool.drain()
    pool.close(2)
    grow(pool, 4)
    assert (orders := pool.drain()) is not None
    assert (orders.ready_pages, orders.unmap_pages) == ([2], [])


def test_a_spare_page_is_no_reason_to_take_memory_from_others() -> None:
    pool = make(min_spare_pages=1, num_resident_pages=1)
    pool.take_from(0)
    pool.reserve_blocks(4)
    pool.take(7)
    pool.drain()
    assert pool.pages_in(IDLE) == [2]
    assert pool._source.wishes == [False, False]  # type: ignore[attr-defined]


def test_what_was_promised_and_not_used_goes_back() -> None:
    pool = make()
    assert pool.reserve_blocks(20) == 20
    pool.take(3)
    pool.drain()
    assert pool.num_promised == 0
    assert pool._source.num_left == NUM_PAGES - 1  # type: ignore[attr-defined]


def test_a_promise_that_is_not_used_is_not_mapped_as_spare_pages() -> None:
    pool = make(8, 8, min_spare_pages=1, num_resident_pages=1)
    pool.take_from(0)
    grow(pool, 3 + 4)  # pages 0 and 1
    assert pool.reserve_blocks(16) == 16
    assert (orders := pool.drain()) is not None
    assert (orders.map_pages, orders.spare_pages) == ([1], [2])
    assert pool._source.num_left == 8 - 2  # type: ignore[attr-defined]


def test_no_more_is_promised_than_the_pool_has() -> None:
    pool = make(6, 100, num_resident_pages=1)
    assert pool.reserve_blocks(12) == 12
    assert pool.reserve_blocks(100) == 8
    assert pool.reserve_blocks(1) == 0


def test_a_refused_promise_gives_what_there_is() -> None:
    pool = make(left=2)
    assert len(grow(pool, 20)) == 8


def test_a_page_reopened_before_the_orders_left_is_not_unmapped() -> None:
    pool = make(left=1)
    blocks = grow(pool, 4)
    pool.drain()
    source = pool._source
    source.settle(1, 0)  # type: ignore[attr-defined]
    give(pool, blocks)
    assert pool.close_idle(1) == 1
    source.num_left += 1  # type: ignore[attr-defined]  # another instance gave a page back
    grow(pool, 4)
    orders = pool.drain()
    assert orders is None or not (orders.map_pages or orders.unmap_pages)
    assert source.num_left == 1  # type: ignore[attr-defined]


def test_with_an_urgent_wish_comes_one_for_spare_pages() -> None:
    pool = make(min_spare_pages=1, max_spare_pages=3)
    assert pool.reserve_blocks(1, is_urgent=True) == 4 * GEOMETRY.blocks_per_page
    assert pool.reserve_blocks(1) == GEOMETRY.blocks_per_page


def test_a_page_is_cached_when_nothing_but_the_prefix_cache_wants_its_blocks() -> None:
    pool = make()
    blocks = grow(pool, 16)
    queue = [blocks[4], blocks[8], blocks[0], blocks[9], blocks[5], blocks[1]]
    queue += [blocks[10], blocks[11], blocks[2], blocks[3], blocks[6]]
    for block in queue:  # page 1 keeps one live block, page 3 four
        pool.num_evictable[GEOMETRY.page_of(block)] += 1
        pool.dirty.add(GEOMETRY.page_of(block))
    assert pool.pages_in(CACHED) == [0, 2]
    assert pool.pages_in(USED) == [1, 3]


def test_only_idle_pages_can_be_closed() -> None:
    pool = make()
    grow(pool, 1)
    with pytest.raises(PageStateError):
        pool.close(0)


@pytest.mark.parametrize("num_pages", NUMBERS_OF_PAGES)
def test_a_full_pool_that_finds_nothing_and_gets_a_page_back_names_no_page_that_is_not_there(
    num_pages: int,
) -> None:
    pool = make(num_pages, num_pages, num_resident_pages=1)
    pool.take_from(0)
    taken = grow(pool, num_pages * GEOMETRY.blocks_per_page)
    assert pool.take(1) == []  # the engine evicts instead ...
    last = [block for block in taken if GEOMETRY.page_of(block) == num_pages - 1]
    give(pool, last)  # ... and preempts, in the same schedule
    assert (orders := pool.drain()) is not None
    assert (orders.map_pages, orders.unmap_pages) == (list(range(1, num_pages - 1)), [])
    assert pool.pages_in(UNMAPPED) == [num_pages - 1]
    assert sorted(pool._unmapped) == [num_pages - 1]


def test_a_promise_left_over_counts_towards_the_spare_pages() -> None:
    pool = make(4, 4, min_spare_pages=1, max_spare_pages=2, num_resident_pages=1)
    pool.take_from(0)
    grow(pool, 3 + 4)  # pages 0 and 1
    source = pool._source
    pool.reserve_blocks(4)  # one page, which nobody opens
    source.wishes.clear()  # type: ignore[attr-defined]
    assert (orders := pool.drain()) is not None
    assert orders.spare_pages == [2, 3]
    assert source.wishes == [False]  # type: ignore[attr-defined]
    assert source.num_promised == 4 - 1  # type: ignore[attr-defined]  # not told of the workers yet


def test_near_a_full_pool_no_more_spare_pages_are_opened_than_there_are() -> None:
    pool = make(3, 9, min_spare_pages=2, max_spare_pages=4, num_resident_pages=1)
    pool.take_from(0)
    grow(pool, 3 + 4)
    pool.reserve_blocks(4)
    pool._source.wishes.clear()  # type: ignore[attr-defined]
    assert (orders := pool.drain()) is not None
    assert orders.spare_pages == [2]
    assert pool._source.wishes == []  # type: ignore[attr-defined]
    assert (pool.num_promised, pool.pages_in(UNMAPPED)) == (0, [])


def test_a_page_that_was_needed_and_closed_before_the_workers_were_told_has_one_order() -> None:
    pool = make(min_spare_pages=1, num_resident_pages=1)
    pool.take_from(0)
    grow(pool, 4)
    pool.drain()  # page 2 is a spare one
    pool.min_spare_pages = 0  # or it is opened again at once
    give(pool, grow(pool, 4))
    pool.close(2)
    assert (orders := pool.drain()) is not None
    assert (orders.ready_pages, orders.unmap_pages) == ([], [2])


class PagePoolMachine(RuleBasedStateMachine):
    """Any sequence of taking, giving, caching and draining keeps the books.

    The pool brings its books up to date when it is asked, so the machine does not ask after each
    rule: `look` and `drain` are rules of their own.
    """

    @initialize(
        num_pages=st.sampled_from(NUMBERS_OF_PAGES),
        blocks_per_page=st.sampled_from([1, 2, 3, 4, 7, 64]),
        share=st.integers(1, 6),
        low=st.integers(0, 3),
        high=st.integers(0, 3),
    )
    def start(self, num_pages: int, blocks_per_page: int, share: int, low: int, high: int) -> None:
        self.num_pages = num_pages
        self.geometry = Geometry(1024, 2, 2 * blocks_per_page + 1, blocks_per_page)
        self.total = max(num_pages * share // 4, 1)  # less than the pool's virtual size, or more
        self.source = CountingSource(self.total)
        self.pool: PagePool[int] = PagePool(
            self.geometry,
            num_pages,
            self.source,
            self.blocks_of,
            min_spare_pages=low,
            max_spare_pages=high,
        )
        self.sure: set[int] = set()
        self.live: list[int] = []
        self.queue: list[int] = []
        self.mapped: set[int] = set()

    def blocks_of(self, page: int) -> list[int]:
        assert 0 <= page < self.num_pages
        first = page * self.geometry.ids_per_page
        return list(range(first, first + self.geometry.blocks_per_page))

    @rule(num_blocks=st.integers(1, 200), is_urgent=st.booleans())
    def promise(self, num_blocks: int, *, is_urgent: bool) -> None:
        self.pool.reserve_blocks(num_blocks, is_urgent=is_urgent)

    @rule(num_blocks=st.integers(1, 10))
    def take(self, num_blocks: int) -> None:
        self.grow(num_blocks)

    @rule(num_pages=st.integers(1, 40))
    def take_much(self, num_pages: int) -> None:
        self.grow(num_pages * self.geometry.blocks_per_page)

    @rule()
    def take_all(self) -> None:
        self.grow(self.num_pages * self.geometry.blocks_per_page)

    def grow(self, num_blocks: int) -> None:
        free_before = self.pool.num_free
        blocks = grow(self.pool, num_blocks)
        assert len(blocks) >= min(num_blocks, free_before)
        assert not set(blocks) & {*self.live, *self.queue}
        assert len(set(blocks)) == len(blocks)
        self.live += blocks

    @precondition(lambda self: self.live)
    @rule(data=st.data(), cache=st.booleans())
    def drop(self, data: st.DataObject, *, cache: bool) -> None:
        self.drop_blocks([data.draw(st.sampled_from(self.live))], cache=cache)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), cache=st.booleans())
    def drop_a_page(self, data: st.DataObject, *, cache: bool) -> None:
        pages = sorted({self.geometry.page_of(block) for block in self.live})
        page = data.draw(st.sampled_from(pages))
        mine = [block for block in self.live if self.geometry.page_of(block) == page]
        self.drop_blocks(mine, cache=cache)

    def drop_blocks(self, blocks: list[int], *, cache: bool) -> None:
        gone = set(blocks)
        self.live = [block for block in self.live if block not in gone]
        for block in blocks:
            page = self.geometry.page_of(block)
            if cache:
                self.queue.append(block)
                self.pool.num_evictable[page] += 1
                self.pool.dirty.add(page)
            else:
                self.pool.give(page, [block])

    @precondition(lambda self: self.queue)
    @rule()
    def hit(self) -> None:
        self.use(self.queue.pop())

    @precondition(lambda self: self.queue)
    @rule()
    def evict(self) -> None:
        self.use(self.queue.pop(0))

    def use(self, block: int) -> None:
        page = self.geometry.page_of(block)
        self.pool.num_evictable[page] -= 1
        self.pool.dirty.add(page)
        self.live.append(block)

    @rule()
    def evict_pages(self) -> None:
        for page in self.pool.pages_in(CACHED)[:1]:
            mine = [block for block in self.queue if self.geometry.page_of(block) == page]
            self.queue = [block for block in self.queue if block not in mine]
            self.pool.num_evictable[page] -= len(mine)
            self.pool.give(page, mine)
            self.pool.close(page)

    @rule(num_pages=st.integers(0, 9))
    def close_idle(self, num_pages: int) -> None:
        self.pool.close_idle(num_pages)

    @rule()
    def drain(self) -> None:
        orders = self.pool.drain()
        if orders is not None:
            told = orders.map_pages + orders.ready_pages + orders.spare_pages + orders.unmap_pages
            assert len(set(told)) == len(told)  # a page has one order
            assert set(told) <= set(range(self.num_pages))
            new = orders.map_pages + orders.spare_pages
            assert not set(new) & self.mapped
            assert set(orders.unmap_pages + orders.ready_pages) <= self.mapped
            self.mapped = (self.mapped | set(new)) - set(orders.unmap_pages)
            self.sure |= {*orders.map_pages, *orders.ready_pages}
            self.sure -= set(orders.unmap_pages)
            self.source.settle(len(new), len(orders.unmap_pages))
            assert orders.num_used_pages == len(self.pool.pages_in(USED))
        assert self.source.num_promised == 0
        assert self.source.num_left + len(self.mapped) == self.total
        assert len(self.pool.pages_in(IDLE)) <= self.pool.max_spare_pages
        backed = {self.geometry.page_of(block) for block in self.live + self.queue}
        assert backed <= self.sure

    @rule()
    def look(self) -> None:
        states = {state: set(self.pool.pages_in(state)) for state in (USED, CACHED, IDLE)}
        live = {self.geometry.page_of(block) for block in self.live}
        cached = {self.geometry.page_of(block) for block in self.queue} - live
        unmapped = self.pool.pages_in(UNMAPPED)
        assert (states[USED], states[CACHED]) == (live, cached)
        assert sorted(self.pool._unmapped) == unmapped
        assert set(self.pool._idle) == states[IDLE]
        assert self.pool.num_resident_pages == sum(map(len, states.values()))
        assert self.pool.num_resident_pages + len(unmapped) == self.num_pages
        places = Counter(self.live) + Counter(self.queue)
        places += Counter(block for blocks in self.pool.free_lists for block in blocks)
        assert set(places.values()) <= {1}
        assert len(places) == self.pool.num_resident_blocks
        assert self.pool.num_free == sum(len(blocks) for blocks in self.pool.free_lists)

    @invariant()
    def no_page_and_no_promise_is_made_up(self) -> None:
        """What can be seen without bringing the books up to date."""
        if not hasattr(self, "pool"):
            return
        assert self.pool.dirty <= set(range(self.num_pages))
        assert 0 <= self.pool.num_promised <= len(self.pool._unmapped)
        assert self.source.num_left >= 0
        assert min(self.pool.num_evictable) >= 0
        assert min(self.pool._num_in_state) >= 0

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            self.look()
            self.drain()


TestPagePoolMachine = PagePoolMachine.TestCase
TestPagePoolMachine.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
