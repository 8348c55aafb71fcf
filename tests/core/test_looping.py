"""What is promised before a schedule, if it can be let in at all, and what waits."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from kvcached_core.engine.batch_promise import BatchPromise
from kvcached_core.engine.demand import Demand
from kvcached_core.engine.looping import HOLD_SECONDS, LoopingEngine
from kvcached_core.engine.page_book import PageBook

BLOCKS_PER_PAGE = 8
LEAST_PAGES = 6  # of a longest request
PAGE_BYTES = 1 << 21


@dataclass
class Source:
    """The ledgers, with room for some pages."""

    room_pages: int
    refused_pages: int = 0
    stalled_pages: int = 0
    asked: list[int] = field(default_factory=list)
    promised: list[int] = field(default_factory=list)

    def ask(self, num_pages: int) -> None:
        self.asked.append(num_pages - self.room_pages)
        self.refused_pages = num_pages


class Blocks:
    """A free list over pages of eight blocks."""

    def __init__(self, source: Source, num_free_blocks: int) -> None:
        self.is_bound = False
        self.geometry = SimpleNamespace(page_bytes=PAGE_BYTES)
        self.num_free_blocks = num_free_blocks
        self.pages: Any = self
        self.num_ready_blocks = 0
        self._source = source

    def num_available_blocks(self) -> int:
        return self.num_free_blocks + self._source.room_pages * BLOCKS_PER_PAGE

    def num_lacking(self, num_blocks: int) -> int:
        return max(-(-num_blocks // BLOCKS_PER_PAGE), 0)

    def promise_blocks(self, num_blocks: int, *, is_urgent: bool) -> None:
        assert is_urgent
        granted = min(self.num_lacking(num_blocks), self._source.room_pages)
        if num_blocks <= 0:
            return
        if granted < self.num_lacking(num_blocks):
            self._source.refused_pages = self.num_lacking(num_blocks)
        self._source.promised.append(granted)
        self._source.room_pages -= granted
        self.num_ready_blocks += granted * BLOCKS_PER_PAGE


def take(demand: Demand, *, room: int, free: int, evictable: int = 0) -> tuple[Source, Blocks]:
    source = Source(room)
    blocks = Blocks(source, free)
    engine: Any = LoopingEngine.__new__(LoopingEngine)
    engine.ranks, engine.pools = source, [blocks]
    engine.placing = SimpleNamespace(least_pages=LEAST_PAGES)
    engine.port = SimpleNamespace(
        free_lists=[blocks],
        num_cached_blocks=lambda _number: evictable,
        demand_of=lambda _number, demand: demand,
    )
    BatchPromise(engine.port, engine.promise, source.ask).take(demand)
    source.stalled_pages = engine.stalled_bytes() // PAGE_BYTES
    return source, blocks


def test_the_whole_demand_is_promised_where_there_is_room() -> None:
    source, blocks = take(Demand(2, 40, 10), room=10, free=2)
    assert source.promised == [5]
    assert not blocks.is_bound
    assert not source.asked


def test_what_there_is_is_promised_if_one_request_can_be_let_in() -> None:
    source, blocks = take(Demand(2, 40, 10), room=2, free=0)
    assert source.promised == [2]
    assert blocks.is_bound


def test_nothing_is_promised_for_requests_of_which_none_can_be_let_in() -> None:
    source, blocks = take(Demand(2, 40, 30), room=2, free=2)
    assert source.promised == []
    assert source.asked == [3]  # 40 of 42 blocks are missing: five pages, with room for two
    assert blocks.is_bound  # what is not promised is not counted on


def test_who_stalls_waits_for_one_request_and_not_for_more_than_there_ever_is() -> None:
    # A batch of a hundred pages, of which there are two; then one that may have none of its own.
    for demand in (Demand(0, 100 * BLOCKS_PER_PAGE, 10), Demand(0, 100 * BLOCKS_PER_PAGE, 30)):
        source, _ = take(demand, room=2, free=0)
        assert source.stalled_pages == LEAST_PAGES
    source, _ = take(Demand(0, 3 * BLOCKS_PER_PAGE, 10), room=2, free=0)
    assert source.stalled_pages == 3


def test_what_runs_is_promised_its_next_blocks_all_the_same() -> None:
    source, _ = take(Demand(10, 40, 30), room=2, free=2)
    assert source.promised == [1]


def test_cached_blocks_that_nobody_holds_may_let_one_in() -> None:
    source, _ = take(Demand(2, 40, 30), room=2, free=2, evictable=14)
    assert source.promised == [2]
    assert not source.asked


@dataclass
class Weights:
    """Weights that are there when a test says so, and how often they were asked for."""

    is_active: bool = False
    is_there: bool = False
    num_asked: int = 0
    num_rests: int = 0

    def activate(self) -> bool:
        self.num_asked += 1
        self.is_active = self.is_there
        return self.is_there

    def rest(self) -> None:
        self.num_rests += 1


def loop(*, is_busy: bool, is_pending: bool = False) -> tuple[Any, Weights, list[Demand]]:
    """Return an engine whose weights are elsewhere, and what is promised."""
    engine: Any = LoopingEngine.__new__(LoopingEngine)
    promised: list[Demand] = []
    engine.pools, engine.activation = [SimpleNamespace(book=PageBook(1))], Weights()
    engine._room_pages, engine._held_since = 0, None
    engine.ranks = SimpleNamespace(look=lambda **_: None, room_pages=0, is_waiting=False)
    engine.giving = SimpleNamespace(
        is_yielding=lambda: False, is_debt_held=False, is_awaiting=False
    )
    engine.pay = engine.end_schedule = lambda: None
    engine.batch_promise = SimpleNamespace(take=promised.append)
    engine.port = SimpleNamespace(
        is_busy=lambda: is_busy,
        is_pending=lambda: is_pending,
        is_running=lambda: False,
        demand=lambda: Demand(0, 8, 8),
        num_blocks_to_go_on=lambda: None,
        carry_out_later=lambda: None,
        reopen=lambda **_: None,
        free_lists=[],
        memory=None,
    )
    return engine, engine.activation, promised


def test_without_its_weights_no_prompt_is_computed_and_nothing_is_promised() -> None:
    engine, weights, promised = loop(is_busy=True)
    engine.before_schedule()
    assert engine.must_hold()
    assert (weights.num_asked, promised) == (1, [])
    weights.is_there = True
    engine.before_schedule()
    assert not engine.must_hold()
    assert len(promised) == 1
    engine.before_schedule()
    assert weights.num_asked == 2  # what is there is not asked for


def test_an_engine_without_requests_asks_for_no_weights_and_rests() -> None:
    engine, weights, promised = loop(is_busy=False)
    engine.before_schedule()
    engine.after_schedule(has_batch=False)
    assert (weights.num_asked, weights.num_rests, promised) == (0, 1, [])


def test_an_engine_does_not_rest_while_something_runs_or_waits() -> None:
    for is_busy, is_pending, has_batch in (
        (True, False, False),
        (False, True, False),
        (False, False, True),
    ):
        engine, weights, _ = loop(is_busy=is_busy, is_pending=is_pending)
        engine.after_schedule(has_batch=has_batch)
        assert weights.num_rests == 0


@dataclass
class Loop:
    """A scheduler that may run something, and may have begun a prompt; with its engine."""

    running: bool = False
    needed: int | None = None
    cached: int = 0
    free: int = 0
    yielding: bool = False
    now: float = 100.0
    num_given_up: int = 0

    def __post_init__(self) -> None:
        blocks = Blocks(Source(0), self.free)
        blocks.book = PageBook(1)  # type: ignore[attr-defined]
        self.engine: Any = LoopingEngine.__new__(LoopingEngine)
        self.engine._held_since, self.engine._room_pages = None, 0
        self.engine.pools = [blocks]
        self.engine.activation = SimpleNamespace(is_active=True)
        self.engine.giving = SimpleNamespace(
            is_yielding=lambda: self.yielding,
            is_debt_held=False,
            is_awaiting=False,
            pay=lambda: True,
        )
        self.engine.ranks = SimpleNamespace(
            clock=lambda: self.now, look=lambda **_: None, room_pages=0
        )
        self.engine.port = SimpleNamespace(
            free_lists=[blocks],
            num_blocks_to_go_on=lambda: self.needed,
            num_to_go_on=lambda _number, num_blocks: num_blocks,
            num_cached_blocks=lambda _number: self.cached,
            is_running=lambda: self.running,
            is_pending=lambda: self.running,
            is_busy=lambda: False,
            carry_out_later=lambda: None,
            reopen=lambda **_: None,
            demand=lambda: None,
            give_up_part=self.give_up_part,
        )
        self.engine.batch_promise = BatchPromise(self.engine.port, self.engine.promise, pytest.fail)

    def give_up_part(self) -> None:
        self.num_given_up += 1

    def turn(self) -> bool:
        self.engine.before_schedule()
        return bool(self.engine.must_hold())


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("yielding", [False, True])
def test_a_new_prompt_waits_for_a_neighbour_only_while_something_runs(
    *, running: bool, yielding: bool
) -> None:
    assert Loop(running=running, yielding=yielding).turn() is (running and yielding)


def test_a_prompt_that_was_begun_goes_on_if_its_next_part_has_room_with_what_is_cached() -> None:
    assert not Loop(needed=8, free=5, cached=3).turn()
    assert Loop(needed=9, free=5, cached=3).turn()


def test_a_prompt_that_waits_while_nothing_runs_gives_its_part_back_after_a_while() -> None:
    loop = Loop(needed=9)
    for _ in range(2):
        assert loop.turn()
        loop.now += HOLD_SECONDS
    assert not loop.num_given_up
    loop.now += 0.1
    loop.turn()
    assert loop.num_given_up == 1


def test_what_runs_will_free_something_so_a_prompt_waits_for_it_without_end() -> None:
    loop = Loop(needed=9, running=True)
    for _ in range(4):
        assert loop.turn()
        loop.now += HOLD_SECONDS
    assert not loop.num_given_up


def test_a_prompt_that_found_room_again_has_not_waited() -> None:
    loop = Loop(needed=9)
    assert loop.turn()
    loop.needed, loop.now = 0, loop.now + HOLD_SECONDS
    assert not loop.turn()
    loop.needed, loop.now = 9, loop.now + 0.1
    assert loop.turn()
    loop.now += HOLD_SECONDS
    assert loop.turn()
    assert not loop.num_given_up
