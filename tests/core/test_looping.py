"""What is promised before a schedule: what the next batch may take, if it can be let in at all."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from kvcached_core.engine.looping import LoopingEngine
from kvcached_core.engine.looping_port import Demand

BLOCKS_PER_PAGE = 8


@dataclass
class Source:
    """The ledgers, with room for some pages."""

    room_pages: int
    asked: list[int] = field(default_factory=list)
    promised: list[int] = field(default_factory=list)

    def ask(self, num_pages: int) -> None:
        self.asked.append(num_pages)


class Blocks:
    """A free list over pages of eight blocks."""

    def __init__(self, source: Source, num_free_blocks: int) -> None:
        self.is_bound = False
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
        self._source.promised.append(granted)
        self._source.room_pages -= granted
        self.num_ready_blocks += granted * BLOCKS_PER_PAGE


def take(demand: Demand, *, room: int, free: int, evictable: int = 0) -> tuple[Source, Blocks]:
    source = Source(room)
    blocks = Blocks(source, free)
    engine: Any = LoopingEngine.__new__(LoopingEngine)
    engine.ranks, engine.pools = source, [blocks]
    engine.port = SimpleNamespace(free_lists=[blocks], num_cached_blocks=lambda _number: evictable)
    engine.promise_demand(demand)
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


def test_what_runs_is_promised_its_next_blocks_all_the_same() -> None:
    source, _ = take(Demand(10, 40, 30), room=2, free=2)
    assert source.promised == [1]


def test_cached_blocks_that_nobody_holds_may_let_one_in() -> None:
    source, _ = take(Demand(2, 40, 30), room=2, free=2, evictable=14)
    assert source.promised == [2]
    assert not source.asked
