"""Which page is opened next, which goes back, and what the workers are told."""

from collections import Counter
from typing import Any

import pytest
from helpers.page_source import CountingSource, FakeBlock
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvcached_core.engine.free_lists import CACHED, CLOSED, EMPTY, USED, FreeLists
from kvcached_core.engine.page_book import REPORT_SECONDS, PageBook
from kvcached_core.engine.pages import MAX_CLOSED_PAGES, Pages
from kvcached_core.errors import PageStateError
from kvcached_core.memory.geometry import Geometry
from kvcached_core.memory.orders import PageOrders

GEOMETRY = Geometry(block_bytes=1024, num_planes=4, ids_per_page=16, blocks_per_page=4)
NUM_PAGES = 6

# A page of another number than is there would be one of these, less one, under a second name.
NUMBERS_OF_PAGES = [7, 8, 15, 16, 31, 33]


class Pool:
    """Pages and the free lists of their blocks, as an allocator has them; block 0 is its own."""

    def __init__(
        self,
        num_pages: int = NUM_PAGES,
        left: int = 100,
        geometry: Geometry = GEOMETRY,
        **options: Any,
    ) -> None:
        per_page = geometry.blocks_per_page
        self.geometry = geometry
        self.source = CountingSource(left)
        self.free_lists: FreeLists[FakeBlock] = FreeLists(geometry, num_pages, self.blocks_of)
        self.pages = Pages(geometry, num_pages, self.source, self.free_lists, **options)
        self.per_page = per_page
        assert self.free_lists.take_one() == FakeBlock(0)

    def blocks_of(self, page: int) -> list[FakeBlock]:
        first = page * self.geometry.ids_per_page
        return [FakeBlock(first + index) for index in range(self.geometry.blocks_per_page)]

    def grow(self, num_blocks: int) -> list[FakeBlock]:
        """Take so many blocks, or as many as there are."""
        missing = num_blocks - self.free_lists.num_free
        self.pages.promise_blocks(missing)
        self.pages.open_blocks(missing)
        return self.free_lists.take(num_blocks)

    def give(self, blocks: list[FakeBlock]) -> None:
        self.free_lists.give(blocks)

    def page_of(self, block: FakeBlock) -> int:
        return self.geometry.page_of(block.block_id)

    def drain(self, *, is_live: bool | None = None, is_last: bool = False) -> PageOrders | None:
        """End a schedule; requests are live if they have blocks."""
        if is_live is None:
            is_live = self.num_live > 0
        self.pages.end_schedule(is_live=is_live, is_last=is_last)
        return self.pages.book.take_orders(self.free_lists.count_pages, is_live=is_live)

    @property
    def num_live(self) -> int:
        num_cached = sum(self.free_lists._num_cached)
        return self.pages.num_open_blocks - self.free_lists.num_free - num_cached - 1

    @property
    def num_empty(self) -> int:
        """Empty pages, spare ones included."""
        return len(self.pages._spare) + len(self.free_lists.empty_pages())


def test_counts_alone_are_told_seldom_while_requests_are_live_and_at_once_behind_them() -> None:
    now = [0.0]
    pool = Pool(max_spare_pages=4, clock=lambda: now[0])
    first, second = pool.grow(7), pool.grow(4)
    assert (orders := pool.drain()) is not None
    assert orders.num_used_pages == 3
    pool.give(second)
    assert pool.drain() is None
    now[0] = REPORT_SECONDS
    assert (orders := pool.drain()) is not None
    assert orders == PageOrders(num_used_pages=2)
    pool.give(first)
    assert (orders := pool.drain()) is not None
    assert orders.num_used_pages == 1


def test_counts_are_looked_at_as_seldom_as_they_are_told() -> None:
    now = [0.0]
    book = PageBook(NUM_PAGES, lambda: now[0])
    calls = []

    def count() -> tuple[int, int]:
        calls.append(now[0])
        return 2, 0

    assert book.take_orders(count, is_live=True) == PageOrders(num_used_pages=2)
    for now[0] in (0.01, REPORT_SECONDS, REPORT_SECONDS + 0.01, 2 * REPORT_SECONDS):
        assert book.take_orders(count, is_live=True) is None
    assert calls == [0.0, REPORT_SECONDS, 2 * REPORT_SECONDS]


def test_emptied_pages_go_back_and_keep_the_spare_one() -> None:
    pool = Pool(max_spare_pages=1)
    blocks = pool.grow(11)
    assert (orders := pool.drain()) is not None
    assert (orders.map_pages, orders.unmap_pages) == ([1, 2], [])
    pool.give(blocks)
    assert (orders := pool.drain()) is not None
    assert len(orders.unmap_pages) == 1
    assert pool.num_empty == 1


def test_a_burst_goes_back_a_few_pages_at_a_time_while_requests_are_live() -> None:
    pool = Pool(40)
    live, burst = pool.grow(7), pool.grow(100)
    pool.drain()
    pool.give(burst)
    num_closed = []
    while step := pool.drain():
        num_closed.append(len(step.unmap_pages))
    assert num_closed == [MAX_CLOSED_PAGES] * 3 + [1]
    pool.give(live)
    orders = pool.drain()
    assert orders is not None
    assert len(orders.unmap_pages) == 1


def test_a_burst_goes_back_at_once_when_nobody_will_call_again() -> None:
    pool = Pool(40, idle_seconds=5.0)
    pool.give(pool.grow(103))
    assert (orders := pool.drain(is_last=True)) is None or not orders.map_pages
    assert pool.pages.num_resident_pages == 1


def test_empty_pages_stay_a_while_for_the_next_request() -> None:
    now = [0.0]
    pool = Pool(idle_seconds=2.0, clock=lambda: now[0])
    live, dropped = pool.grow(7), pool.grow(8)
    pool.drain()
    pool.give(dropped)
    pool.drain()
    emptied = pool.free_lists.pages_in(EMPTY)
    assert len(emptied) == 2
    now[0] = 1.9
    assert (orders := pool.drain()) is None or not orders.unmap_pages
    now[0] = 2.0
    assert (orders := pool.drain()) is not None
    assert sorted(orders.unmap_pages) == emptied
    pool.give(live)
    pool.drain()
    assert pool.num_empty == 1
    assert pool.pages.seconds_until_due() == 2.0
    assert (orders := pool.drain(is_last=True)) is not None
    assert pool.free_lists.pages_in(EMPTY) == []
    assert pool.free_lists.pages_in(USED) == [0]
    assert pool.pages.seconds_until_due() is None


def test_pages_that_other_requests_need_in_between_linger_anew_whichever_they_are() -> None:
    now = [0.0]
    pool = Pool(8, idle_seconds=1.0, clock=lambda: now[0])
    pool.grow(3)
    first = pool.grow(8)
    pool.grow(4)
    pool.give(first)
    pool.drain()
    now[0] = 0.5
    second = pool.grow(4)  # of one page of the two
    pool.drain()
    pool.give(second)
    pool.drain()
    now[0] = 1.0
    assert (orders := pool.drain()) is not None
    assert len(orders.unmap_pages) == 1
    now[0] = 1.5
    assert (orders := pool.drain()) is not None
    assert len(orders.unmap_pages) == 1


def test_a_quiet_pool_keeps_one_empty_page_of_its_spare_ones() -> None:
    now = [0.0]
    pool = Pool(8, min_spare_pages=2, max_spare_pages=4, idle_seconds=1.0, clock=lambda: now[0])
    live = pool.grow(7)
    pool.drain()
    assert pool.num_empty == 4
    pool.give(live)
    now[0] = 0.5
    pool.drain()
    assert pool.num_empty == 5
    assert pool.pages.seconds_until_due() == 1.0
    now[0] = 1.5
    pool.drain()
    assert pool.num_empty == 1


def test_a_spare_page_is_mapped_ahead_while_requests_run_and_not_otherwise() -> None:
    pool = Pool(min_spare_pages=1)
    assert (orders := pool.drain()) is not None
    assert (orders.map_pages, orders.spare_pages) == ([], [])
    pool.grow(7)
    assert (orders := pool.drain()) is not None
    assert (orders.map_pages, orders.spare_pages) == ([1], [2])
    assert orders.num_used_pages == 2


def test_no_block_of_a_spare_page_is_taken_before_the_page_is_opened() -> None:
    pool = Pool(min_spare_pages=1)
    pool.grow(3)
    pool.drain()
    assert pool.pages.num_ready_blocks == GEOMETRY.blocks_per_page
    assert pool.free_lists.num_free == 0
    assert pool.free_lists.take(1) == []


def test_a_spare_page_is_named_again_when_a_step_needs_it() -> None:
    pool = Pool(min_spare_pages=1)
    pool.grow(7)
    pool.drain()
    pool.grow(4)
    assert (orders := pool.drain()) is not None
    assert (orders.map_pages, orders.ready_pages, orders.spare_pages) == ([], [2], [3])


def test_spare_pages_are_opened_up_to_the_high_watermark_when_they_fall_below_the_low_one() -> None:
    pool = Pool(16, min_spare_pages=2, max_spare_pages=4)
    pool.grow(3)
    num_spare = []
    for _ in range(6):
        pool.grow(4)
        orders = pool.drain()
        num_spare.append(len(orders.spare_pages) if orders else 0)
    assert num_spare == [4, 0, 0, 3, 0, 0]


def test_who_wants_to_know_hears_of_open_pages_that_were_closed() -> None:
    pool, heard = Pool(), list[int]()
    pool.pages.on_close = heard.extend
    pool.give(pool.grow(9))
    pool.pages.close_empty(NUM_PAGES)
    assert sorted(heard) == [1, 2]


def test_a_spare_page_that_was_closed_and_opened_again_is_made_sure_of() -> None:
    pool = Pool(min_spare_pages=1)
    pool.grow(7)
    pool.drain()
    assert pool.pages.close_empty(1) == 1
    pool.grow(4)
    assert (orders := pool.drain()) is not None
    assert (orders.ready_pages, orders.unmap_pages) == ([2], [])


def test_a_spare_page_is_no_reason_to_take_memory_from_others() -> None:
    pool = Pool(min_spare_pages=1)
    pool.grow(7)
    pool.drain()
    assert pool.num_empty == 1
    assert pool.source.wishes == [False, False]


def test_what_was_promised_and_not_used_goes_back() -> None:
    pool = Pool(left=5)
    pool.pages.promise_blocks(20)
    assert pool.pages.num_ready_blocks == 20
    pool.grow(4)
    pool.drain()
    assert (pool.pages.num_promised, pool.pages.num_ready_blocks) == (0, 0)
    assert pool.source.num_left == 4


def test_a_promise_that_is_not_used_is_not_mapped_as_spare_pages() -> None:
    pool = Pool(8, 7, min_spare_pages=1)
    pool.grow(3 + 4)  # pages 0 and 1
    pool.pages.promise_blocks(16)
    assert (orders := pool.drain()) is not None
    assert (orders.map_pages, orders.spare_pages) == ([1], [2])
    assert pool.source.num_left == 7 - 2


def test_no_more_is_promised_than_the_pool_has() -> None:
    pool = Pool(6)
    assert pool.pages.promise(3, is_urgent=False) == 3
    assert pool.pages.promise(100, is_urgent=False) == 2
    assert pool.pages.promise(1, is_urgent=False) == 0


def test_what_is_ready_already_is_not_promised_again() -> None:
    pool = Pool()
    pool.pages.promise_blocks(5)
    pool.pages.promise_blocks(8)
    assert pool.pages.num_promised == 2
    pool.pages.promise_blocks(9)
    assert pool.pages.num_promised == 3


def test_a_refused_promise_gives_what_there_is() -> None:
    assert len(Pool(left=2).grow(20)) == 3 + 8


def test_a_page_reopened_before_the_orders_left_is_not_unmapped() -> None:
    pool = Pool(left=1)
    blocks = pool.grow(7)
    pool.source.settle(pool.drain())
    pool.give(blocks)
    assert pool.pages.close_empty(1) == 1
    pool.source.num_left += 1  # another instance gave a page back
    pool.grow(7)
    orders = pool.drain()
    assert orders is None or not (orders.map_pages or orders.unmap_pages)
    assert pool.source.num_left == 1


def test_with_an_urgent_wish_comes_one_for_spare_pages() -> None:
    pool = Pool(min_spare_pages=1, max_spare_pages=3)
    assert pool.pages.promise(1, is_urgent=True) == 4
    assert pool.pages.promise(1, is_urgent=False) == 1


@pytest.mark.parametrize("num_pages", NUMBERS_OF_PAGES)
def test_a_full_pool_that_finds_nothing_and_gets_a_page_back_names_no_page_that_is_not_there(
    num_pages: int,
) -> None:
    pool = Pool(num_pages)
    taken = pool.grow(num_pages * GEOMETRY.blocks_per_page)
    assert pool.grow(1) == []  # the engine evicts instead ...
    last = [block for block in taken if pool.page_of(block) == num_pages - 1]
    pool.give(last)  # ... and preempts, in the same schedule
    assert (orders := pool.drain()) is not None
    assert (orders.map_pages, orders.unmap_pages) == (list(range(1, num_pages - 1)), [])
    assert pool.free_lists.pages_in(CLOSED) == [num_pages - 1]
    assert sorted(pool.pages.book._unmapped) == [num_pages - 1]


def test_a_promise_left_over_counts_towards_the_spare_pages() -> None:
    pool = Pool(4, 3, min_spare_pages=1, max_spare_pages=2)
    pool.grow(3 + 4)  # pages 0 and 1
    pool.pages.promise_blocks(4)  # one page, which nobody opens
    pool.source.wishes.clear()
    assert (orders := pool.drain()) is not None
    assert orders.spare_pages == [2, 3]
    assert pool.source.wishes == [False]
    assert pool.source.num_promised == 4 - 1  # the workers have not been told yet


def test_near_a_full_pool_no_more_spare_pages_are_opened_than_there_are() -> None:
    pool = Pool(3, min_spare_pages=2, max_spare_pages=4)
    pool.grow(3 + 4)
    pool.pages.promise_blocks(4)
    pool.source.wishes.clear()
    assert (orders := pool.drain()) is not None
    assert orders.spare_pages == [2]
    assert pool.source.wishes == []
    assert (pool.pages.num_promised, pool.pages.book.num_left) == (0, 0)


def test_a_page_that_was_needed_and_closed_before_the_workers_were_told_has_one_order() -> None:
    pool = Pool(min_spare_pages=1)
    pool.grow(7)
    pool.drain()  # page 2 is a spare one
    pool.pages.min_spare_pages = 0  # or it is opened again at once
    pool.give(pool.grow(4))
    pool.pages.close([2])
    assert (orders := pool.drain()) is not None
    assert (orders.ready_pages, orders.unmap_pages) == ([], [2])


def test_spare_pages_go_before_empty_ones_and_so_many_stay_as_shall() -> None:
    pool = Pool(8, min_spare_pages=2)
    dropped = pool.grow(11)[3:]
    pool.drain()
    pool.give(dropped)
    assert (len(pool.pages._spare), pool.num_empty) == (2, 4)
    assert pool.pages.close_empty(1) == 1
    assert (len(pool.pages._spare), pool.num_empty) == (1, 3)
    assert pool.pages.close_empty(9, keep=1) == 2
    assert (len(pool.pages._spare), pool.num_empty) == (0, 1)
    assert pool.pages.num_ready_blocks == 0


def test_held_pages_stay_while_their_blocks_may_be_taken_again_and_go_when_copies_have_ended() -> (
    None
):
    pool = Pool(8)
    blocks = pool.grow(3 + 8)[3:]  # pages 1 and 2
    pool.drain()
    pool.pages.hold([block.block_id for block in blocks[:4]], "copy")
    pool.give(blocks)
    assert pool.pages.num_held_empty() == 1
    assert pool.pages.close_empty(9) == 1
    assert pool.free_lists.pages_in(EMPTY) == [1]
    assert set(pool.grow(4)) == set(blocks[:4])
    pool.give(blocks[:4])
    with pytest.raises(PageStateError, match=r"pages \[1\] cannot be closed"):
        pool.pages.close([1])
    pool.pages.book.holds.release("copy")
    assert (pool.pages.num_held_empty(), pool.pages.close_empty(9)) == (0, 1)


def test_a_held_page_is_one_of_those_that_are_kept() -> None:
    pool = Pool(8)
    blocks = pool.grow(3 + 8)[3:]
    pool.drain()
    pool.pages.hold([blocks[0].block_id], "copy")
    pool.give(blocks)
    assert pool.pages.close_empty(9, keep=2) == 0
    assert pool.pages.close_empty(9, keep=1) == 1


def test_held_surplus_pages_are_due_still_and_go_with_the_schedule_after_their_copy() -> None:
    now = [0.0]
    pool = Pool(8, idle_seconds=2.0, clock=lambda: now[0])
    live, dropped = pool.grow(7), pool.grow(8)
    pool.drain()
    pool.pages.freed_ids.extend(block.block_id for block in dropped)
    pool.give(dropped)
    pool.drain()
    now[0] = 2.0
    assert (orders := pool.drain()) is None or not orders.unmap_pages
    pool.pages.book.holds.settle()
    assert (orders := pool.drain()) is not None
    assert len(orders.unmap_pages) == 2
    assert live


def test_while_who_asked_waits_for_copies_surplus_pages_go_nowhere_else() -> None:
    pool = Pool(8)
    pool.give(pool.grow(3 + 8)[3:])
    pool.pages.book.holds.num_awaited = 1
    pool.drain()
    assert pool.num_empty == 2
    pool.pages.book.holds.num_awaited = 0
    pool.drain()
    assert pool.num_empty == 0


def test_no_spare_page_is_opened_while_somebody_awaits_what_copies_hold() -> None:
    pool = Pool(min_spare_pages=2, max_spare_pages=2)
    pool.grow(9)
    pool.pages.book.holds.num_awaited = 1
    pool.drain()
    assert pool.num_empty == 0
    pool.pages.book.holds.num_awaited = 0
    pool.drain()
    assert pool.num_empty == 2


class Guess(FreeLists[FakeBlock]):
    """Free lists that know only how many pages may be empty at most."""

    def num_empty_pages(self, *, is_live: bool) -> int:
        return self.num_free // self._blocks_per_page


def test_where_fewer_pages_are_empty_than_it_seemed_they_are_counted_again_later() -> None:
    now = [0.0]
    pool = Pool(8, idle_seconds=1.0, clock=lambda: now[0])
    pool.free_lists.__class__ = Guess
    blocks = pool.grow(3 + 16)[3:]
    pool.drain()
    pool.give(blocks[::2])  # two pages' worth, and no page of it
    pool.drain()
    now[0] = 1.0
    assert (orders := pool.drain()) is None or not orders.unmap_pages
    pool.give(blocks[1:4:2])
    now[0] = 1.5
    assert (orders := pool.drain()) is None or not orders.unmap_pages
    now[0] = 2.5
    assert (orders := pool.drain()) is not None
    assert len(orders.unmap_pages) == 1


def test_two_pools_of_one_arena_have_different_pages_and_page_0_is_neithers() -> None:
    book = PageBook(8)
    source = CountingSource(100)
    lists = [FreeLists(GEOMETRY, 8, Pool(8).blocks_of) for _ in range(2)]
    pools = [Pages(GEOMETRY, 8, source, each, shared=book) for each in lists]
    for pool in pools:
        pool.promise(4 if pool is pools[0] else 2, is_urgent=False)
    opened = [pool.open_blocks(8) for pool in (*pools, pools[0])]
    assert opened == [[1, 2], [3, 4], [5, 6]]
    assert [pool.num_open_pages for pool in pools] == [4, 2]
    for pool in pools:
        pool.promise(9, is_urgent=False)
    assert (book.num_left, sum(pool.num_promised for pool in pools)) == (0, 1)
    pools[0].close([2])
    pools[0].cancel()
    pools[1].promise(1, is_urgent=False)
    assert pools[1].open_blocks(4) == [2]
    assert (orders := book.take_orders(lambda: (7, 0), is_live=True)) is not None
    assert (sorted(orders.map_pages), orders.unmap_pages) == ([1, 2, 3, 4, 5, 6], [])


def test_what_one_pool_was_promised_no_other_one_is() -> None:
    book = PageBook(8)
    source = CountingSource(100)
    lists = [FreeLists(GEOMETRY, 8, Pool(8).blocks_of) for _ in range(2)]
    first, second = (Pages(GEOMETRY, 8, source, each, shared=book) for each in lists)
    assert first.promise(5, is_urgent=False) == 5
    assert second.promise(1, is_urgent=False) == 1
    assert first.promise(9, is_urgent=False) == 1
    first.cancel()
    assert second.promise(9, is_urgent=False) == 6
    assert (book.num_left, book.num_promised) == (0, second.num_promised)


class PagesMachine(RuleBasedStateMachine):
    """Any sequence of taking, giving, caching and ending schedules keeps the books.

    They are brought up to date when somebody asks, so the machine does not ask after each rule:
    `look` and `end_schedule` are rules of their own.
    """

    @initialize(
        num_pages=st.sampled_from(NUMBERS_OF_PAGES),
        blocks_per_page=st.sampled_from([1, 2, 3, 4, 7, 64]),
        share=st.integers(1, 6),
        spares=st.tuples(st.integers(0, 3), st.integers(0, 3)),
        idle_seconds=st.sampled_from([0.0, 2.0]),
    )
    def start(
        self,
        num_pages: int,
        blocks_per_page: int,
        share: int,
        spares: tuple[int, int],
        idle_seconds: float,
    ) -> None:
        self.num_pages = num_pages
        self.geometry = Geometry(1024, 2, 2 * blocks_per_page + 1, blocks_per_page)
        self.now = 0.0
        self.idle_seconds = idle_seconds
        self.total = max(num_pages * share // 4, 1)  # less than the pool's virtual size, or more
        self.pool = Pool(
            num_pages,
            self.total,
            self.geometry,
            min_spare_pages=spares[0],
            max_spare_pages=spares[1],
            idle_seconds=idle_seconds,
            clock=lambda: self.now,
        )
        self.free_lists, self.pages, self.source = (
            self.pool.free_lists,
            self.pool.pages,
            self.pool.source,
        )
        self.sure = {0}
        self.mapped = {0}
        self.live: list[FakeBlock] = []
        self.queue: list[FakeBlock] = []
        self.copies: dict[int, set[int]] = {}  # pages of each
        self.freed: set[int] = set()  # pages of which a copy may be made still
        self.num_copies = 0

    @property
    def held(self) -> set[int]:
        return self.freed.union(*self.copies.values())

    @rule(seconds=st.sampled_from([0.01, 1.0, 2.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(num_blocks=st.integers(1, 200), is_urgent=st.booleans())
    def promise(self, num_blocks: int, *, is_urgent: bool) -> None:
        self.pages.promise_blocks(num_blocks, is_urgent=is_urgent)

    @rule(num_blocks=st.integers(1, 10))
    def take(self, num_blocks: int) -> None:
        self.grow(num_blocks)

    @rule(num_pages=st.integers(1, 40))
    def take_much(self, num_pages: int) -> None:
        self.grow(num_pages * self.geometry.blocks_per_page)

    @rule()
    def take_all(self) -> None:
        self.grow(self.num_pages * self.geometry.blocks_per_page)

    @rule(num_blocks=st.integers(1, 10))
    def take_one_by_one(self, num_blocks: int) -> None:
        taken = [self.free_lists.take_one() for _ in range(num_blocks)]
        self.have([block for block in taken if block is not None])

    def grow(self, num_blocks: int) -> None:
        free_before = self.free_lists.num_free
        blocks = self.pool.grow(num_blocks)
        assert len(blocks) >= min(num_blocks, free_before)
        self.have(blocks)

    def have(self, blocks: list[FakeBlock]) -> None:
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
        pages = sorted({self.pool.page_of(block) for block in self.live})
        page = data.draw(st.sampled_from(pages))
        self.drop_blocks(
            [block for block in self.live if self.pool.page_of(block) == page], cache=cache
        )

    @rule(step=st.integers(2, 9), cache=st.booleans())
    def drop_here_and_there(self, step: int, *, cache: bool) -> None:
        self.drop_blocks(self.live[::step], cache=cache)

    def drop_blocks(self, blocks: list[FakeBlock], *, cache: bool) -> None:
        gone = set(blocks)
        self.live = [block for block in self.live if block not in gone]
        if cache:  # what may be hit later may be copied later
            self.pages.freed_ids += [block.block_id for block in blocks]
            self.freed |= {self.pool.page_of(block) for block in blocks}
        if cache:
            self.queue += blocks
            self.free_lists.add_cached(blocks)
        else:
            self.free_lists.give(blocks)

    @precondition(lambda self: self.live or self.queue)
    @rule(step=st.integers(1, 9))
    def a_copy_begins(self, step: int) -> None:
        copied = [*self.live, *self.queue][::step]
        self.num_copies += 1
        self.copies[self.num_copies] = {self.pool.page_of(block) for block in copied}
        self.pages.hold([block.block_id for block in copied], self.num_copies)

    @precondition(lambda self: self.copies)
    @rule(number=st.integers(0, 9))
    def a_copy_ends(self, number: int) -> None:
        copy = [*self.copies][number % len(self.copies)]
        self.pages.book.holds.release(copy)
        del self.copies[copy]

    @rule()
    def copies_are_made_of_what_was_freed(self) -> None:
        self.pages.book.holds.settle()
        self.freed.clear()

    @precondition(lambda self: self.queue)
    @rule()
    def hit(self) -> None:
        self.use(self.queue.pop())

    @precondition(lambda self: self.queue)
    @rule()
    def evict(self) -> None:
        self.use(self.queue.pop(0))

    def use(self, block: FakeBlock) -> None:
        self.free_lists.remove_cached([block])
        self.live.append(block)

    @rule()
    def evict_pages(self) -> None:
        for page in [p for p in self.free_lists.pages_in(CACHED) if p not in self.held][:1]:
            mine = [block for block in self.queue if self.pool.page_of(block) == page]
            assert self.free_lists._num_cached[page] == len(mine)
            self.queue = [block for block in self.queue if block not in mine]
            self.free_lists.remove_cached(mine)
            self.free_lists.give(mine)
            self.pages.close([page])

    @rule(num_pages=st.integers(0, 9), keep=st.integers(0, 3))
    def close_empty(self, num_pages: int, keep: int) -> None:
        num_empty, num_held = self.pool.num_empty, self.pages.num_held_empty()
        assert num_held == len(self.held & set(self.free_lists.empty_pages()))
        num_closed = self.pages.close_empty(num_pages, keep=keep)
        assert num_closed == min(num_pages, max(num_empty - max(keep, num_held), 0))

    @rule(is_last=st.booleans())
    def end_schedule(self, *, is_last: bool) -> None:
        is_live = bool(self.live)
        orders = self.pool.drain(is_live=is_live, is_last=is_last)
        self.source.settle(orders)
        if orders is not None:
            told = orders.map_pages + orders.ready_pages + orders.spare_pages + orders.unmap_pages
            assert len(set(told)) == len(told)  # a page has one order
            assert set(told) <= set(range(1, self.num_pages))
            new = orders.map_pages + orders.spare_pages
            assert not set(new) & self.mapped
            assert set(orders.unmap_pages + orders.ready_pages) <= self.mapped
            assert not set(orders.unmap_pages) & self.held
            self.mapped = (self.mapped | set(new)) - set(orders.unmap_pages)
            self.sure |= {*orders.map_pages, *orders.ready_pages}
            self.sure -= set(orders.unmap_pages)
            assert orders.num_used_pages == len(self.free_lists.pages_in(USED))
        assert self.source.num_promised == 0
        assert self.source.num_left + len(self.mapped) == self.total + 1
        if is_last or not self.idle_seconds:
            high = self.pages.max_spare_pages
            kept = high if is_live else min(high, self.pages.num_quiet_pages)
            in_time = self.num_pages if is_live else 0  # a few with each schedule
            assert self.pool.num_empty <= kept + in_time + self.pages.num_held_empty()
        backed = {self.pool.page_of(block) for block in self.live + self.queue}
        assert backed <= self.sure

    @rule()
    def look(self) -> None:
        of_state = {
            state: set(self.free_lists.pages_in(state)) for state in (USED, CACHED, EMPTY, CLOSED)
        }
        live = {self.pool.page_of(block) for block in self.live} | {0}
        cached = {self.pool.page_of(block) for block in self.queue} - live
        assert (of_state[USED], of_state[CACHED]) == (live, cached)
        assert self.free_lists.count_pages() == (len(live), len(cached))
        assert set(self.free_lists.empty_pages()) == of_state[EMPTY]
        assert self.free_lists.num_empty_pages(is_live=False) == len(of_state[EMPTY])
        unmapped = sorted({*self.pages.book._unmapped, *self.pages._spare})
        assert unmapped == sorted(of_state[CLOSED])
        assert set(self.pages.open_pages) == live | cached | of_state[EMPTY]
        assert len(self.pages.book._unmapped) + self.pages.num_resident_pages == self.num_pages
        free = [block for blocks in self.free_lists._lists for block in blocks]
        places = Counter([*self.live, *self.queue, *free, FakeBlock(0)])
        assert set(places.values()) == {1}
        assert len(places) == self.pages.num_open_blocks
        assert self.free_lists.num_free == len(free)

    @invariant()
    def no_page_and_no_promise_is_made_up(self) -> None:
        """What can be seen without bringing the books up to date."""
        if not hasattr(self, "pool"):
            return
        assert self.free_lists._dirty <= set(range(self.num_pages))
        assert 0 <= self.pages.num_promised <= len(self.pages.book._unmapped)
        assert self.pages.num_promised == self.pages.book.num_promised
        num_ready = self.pages.num_promised + len(self.pages._spare)
        assert self.pages.num_ready_blocks == num_ready * self.geometry.blocks_per_page
        assert self.source.num_left >= 0
        assert min(self.free_lists._num_cached) >= 0
        assert min(self.free_lists._num_in_state) >= 0
        num_held = len(self.live) + len(self.queue) + 1
        assert self.free_lists.num_free == self.pages.num_open_blocks - num_held
        assert self.held <= self.pages._open

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            self.look()
            self.end_schedule(is_last=True)
            for copy in self.copies:
                self.pages.book.holds.release(copy)
            self.copies.clear()
            self.copies_are_made_of_what_was_freed()
            assert not self.pages.book.holds
            self.end_schedule(is_last=True)
            if not self.live:
                assert self.pool.num_empty <= self.pages.num_quiet_pages


TestPagesMachine = PagesMachine.TestCase
TestPagesMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
