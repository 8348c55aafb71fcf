"""What an engine gives, to whom first, and what it owes then; the engine is a fake port."""

from types import SimpleNamespace
from typing import Any

import pytest
from helpers.page_source import CountingSource, FakeBlock

from kvcached_core.engine.engine import ElasticEngine
from kvcached_core.engine.free_lists import FreeLists
from kvcached_core.engine.giving import FIRST_PAGES, YIELD_SECONDS, Giving
from kvcached_core.engine.holds import Holds
from kvcached_core.engine.page_book import PageBook
from kvcached_core.engine.pages import Pages
from kvcached_core.engine.ranks import WantedPages
from kvcached_core.engine.weights_kept import WeightsKept
from kvcached_core.memory.geometry import Geometry
from kvcached_core.memory.orders import PageOrders, PendingOrders

GEOMETRY = Geometry(block_bytes=1024, num_planes=4, ids_per_page=16, blocks_per_page=4)
NUM_PAGES = 64


class Engine:
    """Two pools of pages, each used, cached or empty, and a log of what is told."""

    def __init__(self, num_pools: int = 2) -> None:
        self.now = 0.0
        self.is_busy_now = True
        self.is_live_now = True
        self.told: list[tuple[int, bool]] = []
        self.was_last: list[bool] = []
        self.num_published = 0
        self.cached: list[FakeBlock] = []
        self.locked: list[FakeBlock] = []  # cached, and of an open copy
        self.locked_pool = 0
        source, book = CountingSource(1000), PageBook(NUM_PAGES) if num_pools > 1 else None
        self.lists = [FreeLists(GEOMETRY, NUM_PAGES, self.blocks_of) for _ in range(num_pools)]
        self.pools = [Pages(GEOMETRY, NUM_PAGES, source, each, shared=book) for each in self.lists]
        self.book = self.pools[0].book
        if book is None:
            self.lists[0].take_one()  # the padding block
        port: Any = SimpleNamespace(
            is_busy=lambda: self.is_busy_now,
            is_live=lambda: self.is_live_now,
            evict=self.evict,
            publish=self.publish,
            num_idle_blocks=lambda: sum(each.num_free for each in self.lists) + len(self.cached),
            num_locked_blocks=self.num_locked_blocks,
            end_copies=self.end_copies,
        )
        ranks: Any = SimpleNamespace(clock=lambda: self.now)
        self.giving = Giving(ranks, port, self.pools, self.tell)

    def num_locked_blocks(self, number: int) -> int:
        return len(self.locked) if number == self.locked_pool else 0

    @staticmethod
    def blocks_of(page: int) -> list[FakeBlock]:
        first = page * GEOMETRY.ids_per_page
        return [FakeBlock(first + index) for index in range(GEOMETRY.blocks_per_page)]

    def use(self, num_pages: int, *, pool: int = 0) -> list[FakeBlock]:
        num_blocks = num_pages * GEOMETRY.blocks_per_page
        self.pools[pool].promise_blocks(num_blocks)
        self.pools[pool].open_blocks(num_blocks)
        return self.lists[pool].take(num_blocks)

    def cache(self, blocks: list[FakeBlock]) -> None:
        self.cached += blocks
        self.lists[0].add_cached(blocks)

    def evict(self, num_pages: int) -> bool:
        pages_of = {block: block.block_id // GEOMETRY.ids_per_page for block in self.cached}
        held = self.book.holds.held_of(set(pages_of.values()))
        evicted = [block for block, page in pages_of.items() if page not in held]
        del evicted[num_pages * GEOMETRY.blocks_per_page :]
        num_more = num_pages - len(evicted) // GEOMETRY.blocks_per_page
        num_more = max(num_more - self.pools[0].num_held_empty(), 0)
        last = [block for block, page in pages_of.items() if page in held]
        evicted += last[: num_more * GEOMETRY.blocks_per_page]
        self.cached = [block for block in self.cached if block not in evicted]
        self.lists[0].remove_cached(evicted)
        self.lists[0].give(evicted)
        return bool(evicted)

    def lock(self, blocks: list[FakeBlock], *, pool: int = 0) -> None:
        self.locked += blocks
        self.locked_pool = pool
        self.pools[pool].hold([block.block_id for block in blocks], "copy")

    def end_copies(self) -> bool:
        blocks, self.locked = self.locked, []
        if blocks:
            self.book.holds.release("copy")
            self.cache(blocks)
        return bool(blocks)

    def tell(self, *, wait: bool, is_last: bool) -> None:
        orders = self.book.take_orders(lambda: (0, 0), is_live=True)
        self.told.append((len(orders.unmap_pages) if orders else 0, wait))
        self.was_last.append(is_last)

    def publish(self) -> None:
        self.num_published += 1


@pytest.fixture
def engine() -> Engine:
    made = Engine()
    made.use(3)  # live for good
    return made


def settle(engine: Engine) -> None:
    """Let the workers know all pages that are open."""
    engine.book.take_orders(lambda: (0, 0), is_live=False)


def test_empty_pages_of_all_pools_go_before_cached_ones(engine: Engine) -> None:
    first, second, third = engine.use(2), engine.use(2, pool=1), engine.use(4)
    settle(engine)
    engine.lists[0].give(first)
    engine.lists[1].give(second)
    engine.cache(third)
    engine.giving.give(WantedPages(asked_pages=5, owed_pages=0))
    assert [pages.num_open_pages for pages in engine.pools] == [3 + 3, 0]
    assert len(engine.cached) == 3 * GEOMETRY.blocks_per_page
    assert engine.told == [(5, False)]
    assert engine.num_published == 1


def test_an_idle_engine_sees_its_first_pages_go_and_a_busy_one_does_not_wait(
    engine: Engine,
) -> None:
    blocks = engine.use(2 * (FIRST_PAGES + 2))
    settle(engine)
    engine.cache(blocks)
    engine.giving.give(WantedPages(FIRST_PAGES + 2, 0))
    assert engine.told == [(FIRST_PAGES + 2, False)]
    engine.told.clear()
    engine.is_busy_now = False
    engine.giving.give(WantedPages(FIRST_PAGES + 2, 0))
    assert engine.told == [(FIRST_PAGES, True), (2, False)]


def test_what_cannot_be_given_is_owed_as_far_as_requests_have_to_stop_for_it(
    engine: Engine,
) -> None:
    engine.lists[0].give(engine.use(1))
    engine.giving.give(WantedPages(asked_pages=6, owed_pages=2))
    assert engine.giving.owed_pages == 2
    engine.giving.give(WantedPages(asked_pages=0, owed_pages=0))
    assert engine.giving.owed_pages == 0


def test_what_pages_pay_at_once_is_not_owed(engine: Engine) -> None:
    engine.lists[0].give(engine.use(5))
    engine.giving.give(WantedPages(asked_pages=6, owed_pages=4))
    assert engine.giving.owed_pages == 1


def test_a_debt_is_paid_with_what_comes_free(engine: Engine) -> None:
    blocks = engine.use(2)
    engine.giving.owed_pages = 2
    assert not engine.giving.pay()
    engine.lists[0].give(blocks[:4])
    assert not engine.giving.pay()
    engine.cache(blocks[4:])
    assert engine.giving.pay()
    assert engine.giving.owed_pages == 0


@pytest.mark.parametrize("num_pools", [1, 2])
def test_an_engine_that_has_nothing_left_owes_nothing_and_one_with_a_page_in_use_does(
    num_pools: int,
) -> None:
    engine = Engine(num_pools)
    blocks = engine.use(2)
    engine.giving.owed_pages = 5
    assert not engine.giving.pay()
    engine.lists[0].give(blocks)
    assert engine.giving.pay()  # it had no more
    assert engine.giving.owed_pages == 0


def test_nothing_is_told_where_nothing_is_asked(engine: Engine) -> None:
    engine.giving.give(WantedPages(0, 0))
    assert (engine.told, engine.num_published) == ([], 0)


def test_a_neighbour_comes_before_new_requests_for_a_while_and_gets_what_comes_free(
    engine: Engine,
) -> None:
    blocks = engine.use(3)
    engine.giving.give(WantedPages(asked_pages=2, owed_pages=0))
    assert engine.giving.is_yielding()
    engine.lists[0].give(blocks[:4])
    assert engine.giving.pay()
    assert engine.pools[0].num_open_pages == 3 + 2
    assert engine.giving.is_yielding()
    engine.lists[0].give(blocks[4:])
    engine.giving.pay()
    assert engine.pools[0].num_open_pages == 3 + 1
    assert not engine.giving.is_yielding()


def test_new_requests_are_held_back_until_a_neighbour_has_what_it_asked_for(
    engine: Engine,
) -> None:
    assert not engine.giving.holds_back()
    blocks = engine.use(3)
    engine.giving.give(WantedPages(asked_pages=2, owed_pages=0))
    assert engine.giving.holds_back()
    engine.lists[0].give(blocks[:4])
    assert engine.giving.holds_back()  # one page went, and one is to go
    assert engine.pools[0].num_open_pages == 3 + 2
    engine.lists[0].give(blocks[4:])
    assert not engine.giving.holds_back()
    assert engine.pools[0].num_open_pages == 3 + 1


def test_nobody_is_held_back_where_nothing_runs_that_could_end(engine: Engine) -> None:
    engine.use(3)
    engine.giving.give(WantedPages(asked_pages=2, owed_pages=0))
    engine.is_live_now = False
    assert not engine.giving.holds_back()


def test_a_neighbour_that_asks_no_more_gets_nothing(engine: Engine) -> None:
    blocks = engine.use(3)
    engine.giving.give(WantedPages(asked_pages=2, owed_pages=0))
    engine.now = YIELD_SECONDS
    engine.lists[0].give(blocks)
    engine.giving.pay()
    assert engine.pools[0].num_open_pages == 3 + 3
    assert not engine.giving.is_yielding()


class Weights(WeightsKept):
    """Weights of which so many bytes may be given."""

    def __init__(self, engine: Engine, num_bytes: int) -> None:
        self._engine = engine
        self.num_bytes = num_bytes
        self.wanted: list[int] = []

    @property
    def can_give(self) -> bool:
        return self.num_bytes > 0

    def give(self, num_bytes: int) -> int:
        self._engine.told.append((0, True))
        self.wanted.append(num_bytes)
        given = min(num_bytes, self.num_bytes)
        self.num_bytes -= given
        return given


@pytest.fixture
def weights(engine: Engine) -> Weights:
    made = Weights(engine, 4 * GEOMETRY.page_bytes)
    engine.giving.weights = made
    return made


def test_weights_go_after_all_pages_and_only_as_many_as_are_still_wanted(
    engine: Engine, weights: Weights
) -> None:
    engine.cache(engine.use(2))
    settle(engine)
    engine.giving.give(WantedPages(asked_pages=2, owed_pages=0))
    assert weights.wanted == []
    engine.cache(engine.use(1))
    settle(engine)
    engine.told.clear()
    engine.giving.give(WantedPages(asked_pages=3, owed_pages=0))
    assert weights.wanted == [2 * GEOMETRY.page_bytes]
    assert engine.told == [(1, True), (0, True), (0, False)]  # pages, weights, and that is all
    assert not engine.giving.is_yielding()


def test_what_is_given_of_weights_is_not_wanted_of_requests_that_end(
    engine: Engine, weights: Weights
) -> None:
    weights.num_bytes = GEOMETRY.page_bytes + 1
    engine.giving.give(WantedPages(asked_pages=3, owed_pages=0))
    assert engine.giving._yielded_pages == 2


def test_no_weights_go_for_what_is_owed(engine: Engine, weights: Weights) -> None:
    engine.giving.give(WantedPages(asked_pages=3, owed_pages=3))
    assert weights.wanted == []
    assert engine.giving.owed_pages == 3
    engine.giving.give(WantedPages(asked_pages=5, owed_pages=3))
    assert weights.wanted == [2 * GEOMETRY.page_bytes]
    assert engine.giving.owed_pages == 3


def copy(engine: Engine, blocks: list[FakeBlock], holder: str) -> None:
    engine.pools[0].hold([block.block_id for block in blocks], holder)


def holds_of(engine: Engine) -> Holds:
    return engine.pools[0].book.holds


@pytest.mark.parametrize("is_cached", [True, False])
def test_pages_that_copies_keep_are_on_their_way_and_an_ask_stays_open_for_them(
    engine: Engine, *, is_cached: bool
) -> None:
    first, second = engine.use(2), engine.use(1)
    settle(engine)
    copy(engine, first, "copy")
    for blocks in (first, second):
        if is_cached:
            engine.cache(blocks)
        else:
            engine.lists[0].give(blocks)
    engine.giving.give(WantedPages(asked_pages=3, owed_pages=3))
    assert engine.told == [(1, False)]
    assert engine.was_last == [False]
    assert engine.giving.owed_pages == 0
    assert not engine.giving.is_yielding()
    assert not engine.cached
    assert not holds_of(engine).is_due
    holds_of(engine).release("copy")
    assert holds_of(engine).is_due
    engine.giving.give(WantedPages(asked_pages=2, owed_pages=2))  # what is left of it
    assert engine.told == [(1, False), (2, False)]
    assert engine.was_last == [False, True]
    assert not engine.giving.is_debt_held


@pytest.mark.parametrize("is_cached", [True, False])
def test_nobody_waits_for_a_copy_where_pages_without_one_are_enough(
    engine: Engine, *, is_cached: bool
) -> None:
    held, others = engine.use(2), engine.use(4)
    settle(engine)
    copy(engine, held, "copy")
    if is_cached:
        engine.cache(held)  # in front of the others: it would go first
    else:
        engine.lists[0].give(held)
    engine.cache(others)
    engine.giving.give(WantedPages(asked_pages=3, owed_pages=3))
    assert engine.told == [(3, False)]
    assert engine.was_last == [True]
    assert holds_of(engine).num_awaited == engine.giving.owed_pages == 0
    engine.giving.give(WantedPages(asked_pages=2, owed_pages=0))
    assert engine.told == [(3, False), (1, False)]
    assert engine.was_last == [True, False]
    assert holds_of(engine).num_awaited == 1


def test_what_stopped_requests_leave_pays_though_copies_keep_it(engine: Engine) -> None:
    blocks = engine.use(4)
    settle(engine)
    engine.giving.give(WantedPages(asked_pages=2, owed_pages=2))
    assert engine.was_last == [True]
    copy(engine, blocks, "copy")
    engine.lists[0].give(blocks)
    assert engine.giving.pay()
    assert engine.giving.is_debt_held
    assert engine.pools[0].num_open_pages == 3 + 4
    holds_of(engine).release("copy")
    engine.giving.go_on()
    assert engine.pools[0].num_open_pages == 3 + 2
    assert not engine.giving.is_debt_held
    assert engine.giving.owed_pages == 0


def test_what_requests_took_again_of_a_debt_is_owed_again(engine: Engine) -> None:
    blocks = engine.use(4)
    settle(engine)
    engine.giving.owed_pages = 3
    copy(engine, blocks[:4], "first")
    copy(engine, blocks[4:], "second")
    engine.lists[0].give(blocks)
    assert engine.giving.pay()
    engine.lists[0].take(2 * GEOMETRY.blocks_per_page)
    holds_of(engine).release("first")
    engine.giving.go_on()
    assert (engine.giving.owed_pages, engine.pools[0].num_held_empty()) == (1, 2)
    assert engine.giving.is_debt_held
    holds_of(engine).release("second")
    engine.giving.go_on()
    assert engine.pools[0].num_open_pages == 3 + 2
    assert engine.giving.owed_pages == 1


def test_what_a_neighbour_gets_next_may_be_kept_by_copies_and_is_no_debt(engine: Engine) -> None:
    blocks = engine.use(3)
    settle(engine)
    engine.giving.give(WantedPages(asked_pages=2, owed_pages=0))
    copy(engine, blocks, "copy")
    engine.lists[0].give(blocks)
    assert engine.giving.pay()
    assert not engine.giving.is_yielding()
    assert not engine.giving.is_debt_held
    engine.lists[0].take(2 * GEOMETRY.blocks_per_page)
    holds_of(engine).release("copy")
    engine.giving.go_on()
    assert engine.pools[0].num_open_pages == 3 + 2
    assert engine.giving.owed_pages == 0


def test_pages_paid_while_an_answer_is_due_are_announced_and_others_are_not(
    engine: Engine,
) -> None:
    held, first, second = engine.use(1), engine.use(1), engine.use(1)
    settle(engine)
    engine.giving.owed_pages = 1
    engine.lists[0].give(first)
    assert engine.giving.pay()
    assert not engine.giving.has_paid
    copy(engine, held, "copy")
    engine.lists[0].give(held)
    engine.giving.give(WantedPages(asked_pages=2, owed_pages=2))
    assert engine.giving.owed_pages == 1
    engine.lists[0].give(second)
    assert engine.giving.pay()
    assert engine.giving.has_paid


def test_a_debt_that_weights_pay_is_not_held(engine: Engine, weights: Weights) -> None:
    weights.num_bytes = 2 * GEOMETRY.page_bytes
    blocks = engine.use(1)
    settle(engine)
    copy(engine, blocks, "copy")
    engine.lists[0].give(blocks)
    engine.giving.give(WantedPages(asked_pages=3, owed_pages=1))
    assert weights.wanted == [GEOMETRY.page_bytes]
    assert (engine.giving.owed_pages, engine.giving.is_debt_held) == (1, False)


def test_who_is_owed_gets_what_the_cache_keeps_for_copies_and_no_request_stops(
    engine: Engine,
) -> None:
    engine.lock(engine.use(3))
    engine.giving.give(WantedPages(asked_pages=3, owed_pages=2))
    assert not engine.locked
    assert engine.giving.owed_pages == 0
    assert engine.pools[0].num_open_pages == 3
    engine.lock(engine.use(2))
    engine.giving.owed_pages = 2
    assert engine.giving.pay()
    assert engine.pools[0].num_open_pages == 3


def test_a_page_of_which_a_part_is_copied_is_on_its_way(engine: Engine) -> None:
    first, *rest = engine.use(1)
    engine.cache(rest)
    engine.lock([first])
    engine.giving.give(WantedPages(asked_pages=1, owed_pages=0))
    assert engine.was_last == [False]
    engine.end_copies()
    engine.giving.go_on()
    assert engine.pools[0].num_open_pages == 3


def test_what_copies_lock_in_another_pool_is_on_its_way_too(engine: Engine) -> None:
    engine.lock(engine.use(2, pool=1), pool=1)
    engine.giving.give(WantedPages(asked_pages=3, owed_pages=0))
    assert engine.book.holds.num_awaited == 2


def test_an_idle_engine_waits_for_copies_and_a_busy_one_has_what_is_asked_on_its_way(
    engine: Engine,
) -> None:
    engine.lock(engine.use(3))
    engine.giving.give(WantedPages(asked_pages=2, owed_pages=0))
    assert engine.locked
    assert engine.was_last == [False]
    assert engine.book.holds.num_awaited == 2
    engine.end_copies()
    assert engine.book.holds.is_due
    engine.giving.go_on()
    assert engine.pools[0].num_open_pages == 3 + 1
    engine.lock(engine.use(2))
    engine.is_busy_now = False
    engine.giving.give(WantedPages(asked_pages=2, owed_pages=0))
    assert not engine.locked
    assert engine.was_last[-1]


def test_a_sleep_gives_all_pages_where_arenas_have_more_together_than_one_of_them() -> None:
    told: list[PageOrders] = []
    port: Any = SimpleNamespace(
        is_busy=lambda: False,
        evict=lambda _num_pages: False,
        carry_out=lambda orders, wait: told.append(orders),  # noqa: ARG005  by its name
        publish=lambda: None,
    )
    ranks: Any = SimpleNamespace(
        is_one_of_many=False, clear_waiting=lambda: None, clock=lambda: 0.0, close=lambda: None
    )
    engine, orders, source = ElasticEngine(ranks, port), PendingOrders(), CountingSource(1000)
    for number in range(2):  # a limit that was raised since the start lets both of them be full
        blocks = FreeLists(GEOMETRY, NUM_PAGES, Engine.blocks_of)
        book = PageBook(NUM_PAGES, lambda: 0.0, orders, number * NUM_PAGES, Holds())
        pages = Pages(GEOMETRY, NUM_PAGES, source, blocks, book=book)
        blocks.take_one()  # the padding block
        pages.promise_blocks(1000)
        pages.open_blocks(1000)
        engine.pools.append(pages)
    orders.forget()
    engine.empty()
    assert [pages.num_resident_pages for pages in engine.pools] == [1, 1]
    assert len(told[0].unmap_pages) == 2 * (NUM_PAGES - 1)
    engine.close()
