"""Our allocators give the same answers as SGLang's own, apart from the ids, whatever is done."""

from dataclasses import dataclass, field
from inspect import getsource
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator

from kvcached_core.memory.geometry import Geometry
from kvcached_core.memory.orders import PageOrders
from kvcached_sglang.allocators import make_elastic
from kvcached_sglang.blocks import BlockPages

pytestmark = pytest.mark.sglang

EXTENDS_ON_A_CPU = "alloc_extend_naive" in getsource(PagedTokenToKVPoolAllocator.alloc_extend)

GEOMETRY = Geometry(block_bytes=16, num_planes=4, ids_per_page=33, blocks_per_page=8)
NUM_PAGES = 8
NUM_BLOCKS = NUM_PAGES * GEOMETRY.blocks_per_page - 1  # without the padding block
NUMBERS_OF_PAGES = [7, 8, 15, 16, 31, 33]
NUMBERS_OF_BLOCKS = [1, 2, 3, 4, 7, 64]  # a page


@dataclass
class Source:
    """Promises what is left, and remembers what it promised."""

    num_left: int = NUM_PAGES - 1
    num_promised: int = 0
    orders: list[PageOrders] = field(default_factory=list)

    def reserve(self, num_pages: int, *, is_urgent: bool, num_spare: int = 0) -> int:
        granted = min(num_pages + num_spare, self.num_left)
        self.num_left -= granted
        self.num_promised += granted
        return granted

    def cancel(self, num_pages: int) -> None:
        assert 0 < num_pages <= self.num_promised
        self.num_left += num_pages
        self.num_promised -= num_pages


def build(
    block_tokens: int,
    geometry: Geometry = GEOMETRY,
    num_pages: int = NUM_PAGES,
    num_left: int = NUM_PAGES - 1,
) -> tuple[Any, Any, Source]:
    """Return SGLang's allocator, ours of the same size, and who promises it pages."""

    def one() -> Any:
        size = (num_pages * geometry.blocks_per_page - 1) * block_tokens
        if block_tokens == 1:
            return TokenToKVPoolAllocator(size, torch.float32, "cpu", None, need_sort=False)
        return PagedTokenToKVPoolAllocator(
            size, block_tokens, torch.float32, "cpu", None, need_sort=False
        )

    source, ours = Source(num_left), one()
    pages = BlockPages(geometry, num_pages, source, source.orders.append, "cpu")
    make_elastic(ours, pages, lambda: source.num_left * geometry.blocks_per_page)
    return one(), ours, source


class Elastic(RuleBasedStateMachine):
    """Ours: what holds for a pool that may grow and for one whose ledger is dry."""

    block_tokens = 1
    ours: Any

    def begin(self, num_pages: int, blocks_per_page: int, num_left: int) -> Any:
        """Make both; return SGLang's own."""
        self.num_pages = num_pages
        self.geometry = Geometry(16, 2, 2 * blocks_per_page + 1, blocks_per_page)
        vanilla, self.ours, self.source = build(
            self.block_tokens, self.geometry, num_pages, num_left
        )
        self.pages: BlockPages = self.ours.free_list.pages
        self.total = num_left + 1
        self.taken: list[tuple[Any, torch.Tensor]] = []
        self.mapped = {0}
        self.num_of_neighbours = 0
        return vanilla

    def follow_orders(self) -> None:
        for orders in self.source.orders:
            new = {*orders.map_pages, *orders.spare_pages}
            assert len(new) == len(orders.map_pages) + len(orders.spare_pages)
            assert not self.mapped & new
            self.mapped |= new
            self.source.num_promised -= len(new)
            assert self.mapped >= {*orders.ready_pages}
        self.source.orders.clear()

    def release(self, num_pages: int, keep: int) -> None:
        held = {self.geometry.page_of(block) for block in self.blocks_taken()}
        empty = self.mapped - held - {0}
        spare = set(self.pages._spare)
        closed = self.ours.free_list.release(num_pages, keep=keep)
        assert len(set(closed)) == len(closed) == max(min(len(empty) - keep, num_pages), 0)
        assert set(closed) <= empty
        assert set(closed) >= spare or set(closed) <= spare  # what nobody used goes first
        self.mapped.difference_update(closed)
        self.source.num_left += len(closed)

    def blocks_taken(self) -> set[int]:
        return {i // self.block_tokens for _, ours in self.taken for i in ours.tolist()}

    @invariant()
    def every_page_is_in_one_place_and_promises_add_up(self) -> None:
        if not hasattr(self, "ours"):
            return
        pages = self.pages
        places = sorted([*pages._open, *pages._spare, *pages._unmapped])
        assert places == list(range(self.num_pages))
        assert {*pages._open, *pages._spare} == self.mapped
        assert pages.num_promised == self.source.num_promised >= 0
        held = self.source.num_left + self.source.num_promised + self.num_of_neighbours
        assert held + len(self.mapped) == self.total

    @invariant()
    def every_block_of_an_open_page_is_free_or_somebodys(self) -> None:
        if not hasattr(self, "ours"):
            return
        taken = self.blocks_taken()
        tokens = [token for _, ours in self.taken for token in ours.tolist()]
        assert len(set(tokens)) == len(tokens)
        free = self.ours.free_pages.tolist()  # nothing waits to be sorted in
        first, per_page = self.geometry.ids_per_page, self.geometry.blocks_per_page
        existing = [page * first + i for page in self.pages._open for i in range(per_page)]
        assert sorted([0, *free, *taken]) == sorted(existing)


class SameAnswers(Elastic):
    """Both allocators get the same calls."""

    @initialize(
        num_pages=st.sampled_from(NUMBERS_OF_PAGES),
        blocks_per_page=st.sampled_from(NUMBERS_OF_BLOCKS),
    )
    def start(self, num_pages: int, blocks_per_page: int) -> None:
        self.vanilla = self.begin(num_pages, blocks_per_page, num_pages - 1)

    @rule(num_blocks=st.integers(1, 40))
    def alloc(self, num_blocks: int) -> None:
        theirs = self.vanilla.alloc(num_blocks * self.block_tokens)
        ours = self.ours.alloc(num_blocks * self.block_tokens)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert len(ours) == len(theirs)
            self.taken.append((theirs, ours))
        self.follow_orders()

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.taken) - 1))
        theirs, ours = self.taken.pop(index)
        self.vanilla.free(theirs)
        self.ours.free(ours)

    @rule()
    def clear(self) -> None:
        self.vanilla.clear()
        self.ours.clear()
        self.taken.clear()

    @rule()
    def alloc_all(self) -> None:
        num_tokens = self.vanilla.available_size()
        theirs, ours = self.vanilla.alloc(num_tokens), self.ours.alloc(num_tokens)
        assert len(ours) == len(theirs) == num_tokens
        self.taken.append((theirs, ours))
        self.follow_orders()

    @rule(keep=st.integers(0, 3), num_pages=st.integers(0, 40))
    def give(self, keep: int, num_pages: int) -> None:
        self.release(num_pages, keep)

    @rule(num_free=st.integers(0, 40))
    def map_ahead(self, num_free: int) -> None:
        self.ours.free_list.pages.min_spare_pages = 1
        self.ours.free_list.pages.max_spare_pages = 2
        self.ours.free_list.pages.map_ahead(num_free)
        self.follow_orders()

    @rule()
    def end_schedule(self) -> None:
        self.ours.free_list.pages.cancel()

    @invariant()
    def available_tokens_are_the_same(self) -> None:
        assert self.ours.available_size() == self.vanilla.available_size()


class SameAnswersPaged(SameAnswers):
    """Blocks of four tokens, which also grow in place."""

    block_tokens = 4

    # 0.5.15 extends with a kernel that only a GPU runs.
    @precondition(lambda _self: EXTENDS_ON_A_CPU)
    @rule(prefix=st.integers(0, 9), more=st.integers(1, 60))
    def extend(self, prefix: int, more: int) -> None:
        # One request whose first `prefix` tokens were computed, in blocks of its own.
        num_before = -(-prefix // 4) * 4
        held = [(a.alloc(num_before) if num_before else None) for a in (self.vanilla, self.ours)]
        self.follow_orders()
        if num_before and (held[0] is None or held[1] is None):
            assert held == [None, None]
            return
        answers = []
        for allocator, before in zip((self.vanilla, self.ours), held, strict=True):
            last = before[prefix - 1] if prefix else torch.tensor(-1)
            lens, grown = torch.tensor([prefix]), torch.tensor([prefix + more])
            found = allocator.alloc_extend(lens, lens, grown, grown, last.reshape(1), more)
            answers.append(found)
        self.follow_orders()
        assert (answers[0] is None) == (answers[1] is None)
        for index, (before, found) in enumerate(zip(held, answers, strict=True)):
            parts = [part for part in (before, found) if part is not None]
            whole = torch.unique(torch.cat(parts) // 4) if parts else torch.tensor([])
            held[index] = (whole[:, None] * 4 + torch.arange(4)).reshape(-1) if parts else None
        if held[0] is not None and held[1] is not None:
            self.taken.append((held[0], held[1]))


SETTINGS = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestSameAnswers = SameAnswers.TestCase
TestSameAnswers.settings = SETTINGS
TestSameAnswersPaged = SameAnswersPaged.TestCase
TestSameAnswersPaged.settings = SETTINGS


class DryLedger(Elastic):
    """Neighbours take pages and want more back; a schedule promises before it takes."""

    @initialize(
        num_pages=st.sampled_from(NUMBERS_OF_PAGES),
        blocks_per_page=st.sampled_from(NUMBERS_OF_BLOCKS),
        share=st.sampled_from([1, 2, 4]),
        low=st.integers(0, 2),
        high=st.integers(0, 4),
    )
    def start(self, num_pages: int, blocks_per_page: int, share: int, low: int, high: int) -> None:
        self.begin(num_pages, blocks_per_page, (num_pages - 1) // share)
        self.pages.min_spare_pages, self.pages.max_spare_pages = low, max(low, high)

    @rule(num_blocks=st.integers(0, 100))
    def begin_schedule(self, num_blocks: int) -> None:
        self.pages.reserve_blocks(num_blocks)
        self.ours.free_list.is_bound = self.pages.num_ready_blocks < num_blocks

    @rule(num_blocks=st.integers(1, 100))
    def alloc(self, num_blocks: int) -> None:
        num_available = self.ours.available_size()
        found = self.ours.alloc(num_blocks)
        self.follow_orders()
        assert found is not None or num_available < num_blocks
        if found is not None:
            self.taken.append((None, found))

    @rule()
    def alloc_all(self) -> None:
        num_available = self.ours.available_size()
        found = self.ours.alloc(num_available)
        assert len(found) == num_available
        self.taken.append((None, found))
        self.follow_orders()

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        self.ours.free(self.taken.pop(data.draw(st.integers(0, len(self.taken) - 1)))[1])

    @rule(keep=st.integers(0, 3), num_pages=st.integers(0, 40))
    def give(self, keep: int, num_pages: int) -> None:
        self.release(num_pages, keep)

    @rule()
    def map_ahead(self) -> None:
        self.pages.map_ahead(self.ours.free_list.num_free_blocks)
        self.follow_orders()

    @rule()
    def end_schedule(self) -> None:
        self.ours.free_list.is_bound = False
        self.pages.cancel()
        assert self.source.num_promised == 0

    @rule(num_pages=st.integers(1, 8))
    def a_neighbour_takes(self, num_pages: int) -> None:
        taken = min(num_pages, self.source.num_left)
        self.source.num_left -= taken
        self.num_of_neighbours += taken

    @rule()
    def the_neighbours_give(self) -> None:
        self.source.num_left += self.num_of_neighbours
        self.num_of_neighbours = 0

    @rule(num_cached=st.integers(0, 200))
    def count_pages(self, num_cached: int) -> None:
        free_list = self.ours.free_list
        used, cached = free_list.count_pages(min(num_cached, free_list.num_taken_blocks))
        assert used >= 1  # page 0 holds the padding block
        assert 0 <= cached <= self.pages.num_open_pages - used


TestDryLedger = DryLedger.TestCase
TestDryLedger.settings = SETTINGS


def test_the_fullest_page_comes_first_so_that_pages_empty_out() -> None:
    _, ours, _ = build(1)
    ids = ours.alloc(39)  # pages 0 to 4, all but page 0 with eight blocks
    ours.free(ids[10:12])
    ours.free(ids[20:26])
    ours.free_list.release(0)
    assert set(ours.alloc(2).tolist()) == set(ids[10:12].tolist())


def test_closed_pages_count_only_while_sglang_adds_up() -> None:
    vanilla, ours, source = build(1)
    source.num_left = 0
    assert ours.available_size() == GEOMETRY.blocks_per_page - 1
    ours.free_list.is_nominal = True
    assert ours.available_size() == vanilla.available_size() == NUM_BLOCKS


def test_nothing_is_available_while_pages_are_owed() -> None:
    _, ours, _ = build(1)
    ours.free_list.is_owing = True
    assert ours.available_size() == 0


def test_no_more_is_available_than_sglang_has_room_for() -> None:
    vanilla, ours, source = build(1)
    source.num_left = 100  # there is more memory than the pool has pages
    assert ours.available_size() == vanilla.available_size() == NUM_BLOCKS


def test_pages_are_counted_by_the_blocks_on_them() -> None:
    _, ours, _ = build(1)
    ours.alloc(7 + 2 * 8)  # pages 0 to 2, with the padding block
    count_pages = ours.free_list.count_pages
    assert count_pages(0) == (3, 0)
    assert count_pages(8) == (2, 1)
    assert count_pages(7 + 2 * 8) == (1, 2)  # page 0 is used: it holds the padding block
    assert count_pages(12) == (2, 1)  # 12 used, 12 cached: no page counts twice


def test_blocks_that_wait_to_be_sorted_in_are_free_when_pages_are_wanted() -> None:
    size = NUM_BLOCKS
    source = Source()
    ours: Any = TokenToKVPoolAllocator(size, torch.float32, "cpu", None, need_sort=True)
    pages = BlockPages(GEOMETRY, NUM_PAGES, source, source.orders.append, "cpu")
    make_elastic(ours, pages, lambda: 0)
    ours.free(ours.alloc(7 + 2 * 8))
    assert len(ours.release_pages) > 0
    assert sorted(ours.free_list.release(8)) == [1, 2]


def test_a_schedule_that_was_refused_counts_on_what_is_promised_alone() -> None:
    _, ours, source = build(1)
    source.num_left = 3
    ours.free_list.pages.reserve_blocks(GEOMETRY.blocks_per_page)
    num_there = 2 * GEOMETRY.blocks_per_page - 1
    assert ours.available_size() == num_there + 2 * GEOMETRY.blocks_per_page
    ours.free_list.is_bound = True
    assert ours.available_size() == num_there
