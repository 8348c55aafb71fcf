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

from kvcached_core.geometry import Geometry
from kvcached_core.orders import PageOrders
from kvcached_sglang.allocators import make_elastic
from kvcached_sglang.blocks import BlockPages

pytestmark = pytest.mark.sglang

EXTENDS_ON_A_CPU = "alloc_extend_naive" in getsource(PagedTokenToKVPoolAllocator.alloc_extend)

NUM_BLOCKS = 63  # without the padding block
GEOMETRY = Geometry(block_bytes=16, num_planes=4, ids_per_page=33, blocks_per_page=8)
NUM_PAGES = 8


@dataclass
class Source:
    """Promises what is left, and remembers what it promised."""

    num_left: int = NUM_PAGES - 1
    orders: list[PageOrders] = field(default_factory=list)

    def reserve(self, num_pages: int, *, is_urgent: bool, num_spare: int = 0) -> int:
        granted = min(num_pages + num_spare, self.num_left)
        self.num_left -= granted
        return granted

    def cancel(self, num_pages: int) -> None:
        self.num_left += num_pages


def build(block_tokens: int) -> tuple[Any, Any, Source]:
    """Return SGLang's allocator, ours of the same size, and who promises it pages."""

    def one() -> Any:
        size = NUM_BLOCKS * block_tokens
        if block_tokens == 1:
            return TokenToKVPoolAllocator(size, torch.float32, "cpu", None, need_sort=False)
        return PagedTokenToKVPoolAllocator(
            size, block_tokens, torch.float32, "cpu", None, need_sort=False
        )

    source, ours = Source(), one()
    pages = BlockPages(GEOMETRY, NUM_PAGES, source, source.orders.append, "cpu")
    make_elastic(ours, pages, lambda: source.num_left * GEOMETRY.blocks_per_page)
    return one(), ours, source


class SameAnswers(RuleBasedStateMachine):
    """Both allocators get the same calls."""

    block_tokens = 1

    @initialize()
    def start(self) -> None:
        self.vanilla, self.ours, self.source = build(self.block_tokens)
        self.taken: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.mapped = {0}

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

    @rule(keep=st.integers(0, 3), num_pages=st.integers(0, NUM_PAGES))
    def release(self, keep: int, num_pages: int) -> None:
        closed = self.ours.free_list.release(num_pages, keep=keep)
        assert len(closed) <= num_pages
        self.mapped.difference_update(closed)
        self.source.num_left += len(closed)

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

    @invariant()
    def taken_ids_exist_on_mapped_pages_and_are_nobody_elses(self) -> None:
        ids = [i // self.block_tokens for _, ours in self.taken for i in ours.tolist()]
        blocks = ids if self.block_tokens == 1 else sorted(set(ids))
        tokens = [i for _, ours in self.taken for i in ours.tolist()]
        assert len(set(tokens)) == len(tokens)
        assert 0 not in blocks
        assert all(GEOMETRY.exists(block) for block in blocks)
        assert {GEOMETRY.page_of(block) for block in blocks} <= self.mapped

    def follow_orders(self) -> None:
        for orders in self.source.orders:
            assert not self.mapped.intersection(orders.map_pages + orders.spare_pages)
            self.mapped.update(orders.map_pages, orders.spare_pages)
            assert self.mapped.issuperset(orders.ready_pages)
        self.source.orders.clear()


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
