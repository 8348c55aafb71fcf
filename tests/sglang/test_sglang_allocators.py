"""Our allocators give the same answers as SGLang's own, apart from the ids, whatever is done."""

from inspect import getsource
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from helpers.page_source import CountingSource, TakenByNeighbours
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

from kvcached_core.engine.page_book import PageBook
from kvcached_core.engine.pages import Pages
from kvcached_core.errors import PageStateError
from kvcached_core.memory.geometry import Geometry
from kvcached_core.memory.orders import MAP, SPARE, UNMAP
from kvcached_sglang.allocators import make_elastic

pytestmark = pytest.mark.sglang

EXTENDS_ON_A_CPU = "alloc_extend_naive" in getsource(PagedTokenToKVPoolAllocator.alloc_extend)

GEOMETRY = Geometry(block_bytes=16, num_planes=4, ids_per_page=33, blocks_per_page=8)
NUM_PAGES = 8
NUM_BLOCKS = NUM_PAGES * GEOMETRY.blocks_per_page - 1  # without the padding block
NUMBERS_OF_PAGES = [7, 8, 15, 16, 31, 33]
NUMBERS_OF_BLOCKS = [1, 2, 3, 4, 7, 64]  # a page


def engine_of(source: CountingSource) -> Any:
    """Return an engine that owes nothing and has nothing cached."""
    return SimpleNamespace(
        ranks=source,
        giving=SimpleNamespace(owed_pages=0),
        port=SimpleNamespace(num_unneeded_blocks=lambda _number: 0),
    )


def build(
    block_tokens: int,
    geometry: Geometry = GEOMETRY,
    num_pages: int = NUM_PAGES,
    num_left: int = NUM_PAGES - 1,
    *,
    need_sort: bool = False,
) -> tuple[Any, Any, CountingSource]:
    """Return SGLang's allocator, ours of the same size, and who promises it pages."""

    def one() -> Any:
        size = (num_pages * geometry.blocks_per_page - 1) * block_tokens
        if block_tokens == 1:
            return TokenToKVPoolAllocator(size, torch.float32, "cpu", None, need_sort=need_sort)
        return PagedTokenToKVPoolAllocator(
            size, block_tokens, torch.float32, "cpu", None, need_sort=need_sort
        )

    source, ours = CountingSource(num_left), one()
    make_elastic(
        ours, lambda blocks: Pages(geometry, num_pages, source, blocks), engine_of(source), 0
    )
    return one(), ours, source


class Elastic(RuleBasedStateMachine):
    """Ours: what holds for a pool that may grow and for one whose ledger is dry."""

    block_tokens = 1
    num_of_neighbours = 0
    ours: Any

    def begin(self, num_pages: int, blocks_per_page: int, num_left: int) -> Any:
        """Make both; return SGLang's own."""
        self.num_pages = num_pages
        self.geometry = Geometry(16, 2, 2 * blocks_per_page + 1, blocks_per_page)
        vanilla, self.ours, self.source = build(
            self.block_tokens, self.geometry, num_pages, num_left
        )
        self.pages: Pages = self.ours.free_list.pages
        self.total = num_left + 1
        self.taken: list[tuple[Any, torch.Tensor]] = []
        self.mapped = {0}
        return vanilla

    @rule()
    def follow_orders(self) -> None:
        orders = self.pages.book.orders.take(0, 0)
        new = {*orders.map_pages, *orders.spare_pages}
        assert len(new) == len(orders.map_pages) + len(orders.spare_pages)
        assert not self.mapped & new
        assert self.mapped >= {*orders.ready_pages, *orders.unmap_pages}
        self.mapped = self.mapped - {*orders.unmap_pages} | new
        self.source.num_promised -= len(new)
        self.source.num_left += len(orders.unmap_pages)

    @rule(keep=st.integers(0, 3), num_pages=st.integers(0, 40))
    def close_empty(self, keep: int, num_pages: int) -> None:
        held = {self.geometry.page_of(block) for block in self.blocks_taken()}
        before, spare = self.resident(), set(self.pages._spare)
        num_closed = self.pages.close_empty(num_pages, keep=keep)
        closed = before - self.resident()
        empty = before - held - {0}
        assert len(closed) == num_closed == max(min(len(empty) - keep, num_pages), 0)
        assert closed <= empty
        assert closed >= spare or closed <= spare  # what nobody used goes first

    def blocks_taken(self) -> set[int]:
        return {i // self.block_tokens for _, ours in self.taken for i in ours.tolist()}

    def resident(self) -> set[int]:
        """Return the pages that are mapped, or will be before a step needs them."""
        return {*self.pages.open_pages, *self.pages._spare}

    @invariant()
    def every_page_is_in_one_place_and_promises_add_up(self) -> None:
        if not hasattr(self, "ours"):
            return
        pages, orders = self.pages, self.pages.book.orders.kinds
        places = sorted([*pages.open_pages, *pages._spare, *pages.book._unmapped])
        assert places == list(range(self.num_pages))
        going = {page for page, kind in orders.items() if kind == UNMAP}
        coming = {page for page, kind in orders.items() if kind in {MAP, SPARE}}
        assert self.resident() == self.mapped - going | coming
        assert self.source.num_promised == pages.num_promised + len(coming)
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
        existing = [page * first + i for page in self.pages.open_pages for i in range(per_page)]
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
        self.follow_orders()  # what is about to be unmapped is nobody's room yet
        theirs = self.vanilla.alloc(num_blocks * self.block_tokens)
        ours = self.ours.alloc(num_blocks * self.block_tokens)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert len(ours) == len(theirs)
            self.taken.append((theirs, ours))

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
        self.follow_orders()
        num_tokens = self.vanilla.available_size()
        theirs, ours = self.vanilla.alloc(num_tokens), self.ours.alloc(num_tokens)
        assert len(ours) == len(theirs) == num_tokens
        self.taken.append((theirs, ours))

    @rule(is_live=st.booleans())
    def end_schedule(self, is_live: bool) -> None:  # noqa: FBT001  as hypothesis gives it
        self.pages.min_spare_pages, self.pages.max_spare_pages = 1, 2
        self.pages.end_schedule(is_live=is_live)

    @invariant()
    def available_tokens_are_the_same(self) -> None:
        going = [kind for kind in self.pages.book.orders.kinds.values() if kind == UNMAP]
        num_going = len(going) * self.geometry.blocks_per_page * self.block_tokens
        assert self.ours.available_size() + num_going == self.vanilla.available_size()


class SameAnswersPaged(SameAnswers):
    """Blocks of four tokens, which also grow in place."""

    block_tokens = 4

    # 0.5.15 extends with a kernel that only a GPU runs.
    @precondition(lambda _self: EXTENDS_ON_A_CPU)
    @rule(prefix=st.integers(0, 9), more=st.integers(1, 60))
    def extend(self, prefix: int, more: int) -> None:
        self.follow_orders()
        # One request whose first `prefix` tokens were computed, in blocks of its own.
        num_before = -(-prefix // 4) * 4
        held = [(a.alloc(num_before) if num_before else None) for a in (self.vanilla, self.ours)]
        if num_before and (held[0] is None or held[1] is None):
            assert held == [None, None]
            return
        answers = []
        for allocator, before in zip((self.vanilla, self.ours), held, strict=True):
            last = before[prefix - 1] if prefix else torch.tensor(-1)
            lens, grown = torch.tensor([prefix]), torch.tensor([prefix + more])
            found = allocator.alloc_extend(lens, lens, grown, grown, last.reshape(1), more)
            answers.append(found)
        assert (answers[0] is None) == (answers[1] is None)
        for index, (before, found) in enumerate(zip(held, answers, strict=True)):
            parts = [part for part in (before, found) if part is not None]
            whole = torch.unique(torch.cat(parts) // 4) if parts else torch.tensor([])
            held[index] = (whole[:, None] * 4 + torch.arange(4)).reshape(-1) if parts else None
        if held[0] is not None and held[1] is not None:
            self.taken.append((held[0], held[1]))


SETTINGS = settings(max_examples=30, stateful_step_count=40, deadline=None)
TestSameAnswers = SameAnswers.TestCase
TestSameAnswers.settings = SETTINGS
TestSameAnswersPaged = SameAnswersPaged.TestCase
TestSameAnswersPaged.settings = SETTINGS


class DryLedger(TakenByNeighbours, Elastic):
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
        self.pages.promise_blocks(num_blocks, is_urgent=True)
        self.ours.free_list.is_bound = self.pages.num_ready_blocks < num_blocks

    @rule(num_blocks=st.integers(1, 100))
    def alloc(self, num_blocks: int) -> None:
        num_available = self.ours.available_size()
        found = self.ours.alloc(num_blocks)
        assert found is not None or num_available < num_blocks
        if found is not None:
            self.taken.append((None, found))

    @rule()
    def alloc_all(self) -> None:
        num_available = self.ours.available_size()
        found = self.ours.alloc(num_available)
        assert len(found) == num_available
        self.taken.append((None, found))

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        self.ours.free(self.taken.pop(data.draw(st.integers(0, len(self.taken) - 1)))[1])

    @rule(is_live=st.booleans())
    def end_schedule(self, is_live: bool) -> None:  # noqa: FBT001  as hypothesis gives it
        self.ours.free_list.is_bound = False
        self.pages.end_schedule(is_live=is_live)
        assert self.pages.num_promised == 0

    @rule(num_cached=st.integers(0, 200))
    def count_pages(self, num_cached: int) -> None:
        free_list = self.ours.free_list
        num_left = min(num_cached, free_list.num_taken_blocks)
        free_list._count_cached = lambda: num_left
        used, cached = free_list.count_pages()
        assert used >= 1  # page 0 holds the padding block
        assert 0 <= cached <= self.pages.num_open_pages - used


TestDryLedger = DryLedger.TestCase
TestDryLedger.settings = SETTINGS


def test_the_fullest_page_comes_first_so_that_pages_empty_out() -> None:
    _, ours, _ = build(1)
    ids = ours.alloc(39)  # pages 0 to 4, all but page 0 with eight blocks
    ours.free(ids[10:12])
    ours.free(ids[20:26])
    ours.free_list.empty_pages()
    assert set(ours.alloc(2).tolist()) == set(ids[10:12].tolist())


def test_closed_pages_count_only_while_sglang_adds_up() -> None:
    vanilla, ours, source = build(1)
    source.num_left = 0
    assert ours.available_size() == GEOMETRY.blocks_per_page - 1
    ours.free_list.is_nominal = True
    assert ours.available_size() == vanilla.available_size() == NUM_BLOCKS


def test_nothing_is_available_while_pages_are_owed() -> None:
    _, ours, _ = build(1)
    ours.free_list._giving.owed_pages = 1
    assert ours.available_size() == 0


def test_no_more_is_available_than_sglang_has_room_for() -> None:
    vanilla, ours, source = build(1)
    source.num_left = 100  # there is more memory than the pool has pages
    assert ours.available_size() == vanilla.available_size() == NUM_BLOCKS


def test_pages_are_counted_by_the_blocks_on_them() -> None:
    _, ours, _ = build(1)
    ours.alloc(7 + 2 * 8)  # pages 0 to 2, with the padding block

    def count_pages(num_cached: int) -> tuple[int, int]:
        ours.free_list._count_cached = lambda: num_cached
        return cast("tuple[int, int]", ours.free_list.count_pages())

    assert count_pages(0) == (3, 0)
    assert count_pages(8) == (2, 1)
    assert count_pages(7 + 2 * 8) == (1, 2)  # page 0 is used: it holds the padding block
    assert count_pages(12) == (2, 1)  # 12 used, 12 cached: no page counts twice


def test_blocks_that_wait_to_be_sorted_in_are_free_when_pages_are_wanted() -> None:
    _, ours, _ = build(1, need_sort=True)
    ours.free(ours.alloc(7 + 2 * 8))
    assert len(ours.release_pages) > 0
    assert ours.free_list.empty_pages() == [2, 1]


def test_a_page_with_a_block_in_use_is_not_closed() -> None:
    _, ours, _ = build(1)
    ids = ours.alloc(7 + 2 * 8)
    ours.free(ids[ids != 40])
    before = ours.free_pages.tolist()
    with pytest.raises(PageStateError, match=r"pages \[1, 2\] cannot be closed"):
        ours.free_list.pages.close([2, 1])
    assert ours.free_pages.tolist() == before
    assert ours.free_list.pages.open_pages == [0, 1, 2]


def test_two_pools_take_their_pages_from_the_same_ones_and_share_padding_alone() -> None:
    book, source = PageBook(NUM_PAGES), CountingSource(NUM_PAGES - 1)
    first, second = (
        TokenToKVPoolAllocator(NUM_BLOCKS, torch.float32, "cpu", None, need_sort=False)
        for _ in range(2)
    )
    for one in (first, second):
        make_elastic(
            one,
            lambda blocks: Pages(GEOMETRY, NUM_PAGES, source, blocks, shared=book),
            engine_of(source),
            0,
        )
    assert len(first.free_pages) == len(second.free_pages) == 0
    ids = first.alloc(9)
    assert ids.tolist() == [*range(33, 41), 66]
    assert second.alloc(1).tolist() == [99]
    first.free(ids)
    first.free_list.pages.close_empty(1)
    assert second.alloc(8).tolist() == [*range(100, 107), 66]
    assert sorted(book.orders.take(0, 0).map_pages) == [1, 2, 3]  # page 2 has one order


def test_a_schedule_that_was_refused_counts_on_what_is_promised_alone() -> None:
    _, ours, source = build(1)
    source.num_left = 3
    ours.free_list.pages.promise_blocks(GEOMETRY.blocks_per_page, is_urgent=True)
    num_there = 2 * GEOMETRY.blocks_per_page - 1
    assert ours.available_size() == num_there + 2 * GEOMETRY.blocks_per_page
    ours.free_list.is_bound = True
    assert ours.available_size() == num_there
