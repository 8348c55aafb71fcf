"""SGLang's two pools over one arena answer as two pools of their own do, and lose nothing.

Its own pools and allocator serve the same calls twice, as SGLang makes them and over our pages.
What was written for a token has to be there in both pools until it is freed. A token that left the
window is freed in one of them, whose pages may go, and come back in the other.
"""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.sglang_elastic import hooked, let_schedule, make_engine, tell
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

from kvcached_core.engine.ranks import WantedPages
from kvcached_core.units import MIB
from kvcached_sglang import hooks
from kvcached_sglang.engine import SglangEngine
from kvcached_sglang.open_copies import OpenCopies

pytestmark = pytest.mark.sglang

PAGE_BYTES = 2 * MIB  # the granularity
FULL_LAYERS, WINDOW_LAYERS = [0], [1, 2, 3]
NUM_HEADS, HEAD_DIM = 2, 2048  # 64 tokens a page in the one pool, 21 in the other
NUM_FULL_TOKENS, NUM_WINDOW_TOKENS = 400, 200
NUM_PAGES = 20  # as many as both can need


def build() -> Any:
    pool = SWAKVPool(
        size=NUM_FULL_TOKENS,
        size_swa=NUM_WINDOW_TOKENS,
        page_size=1,
        dtype=torch.float32,
        head_num=NUM_HEADS,
        head_dim=HEAD_DIM,
        swa_attention_layer_ids=WINDOW_LAYERS,
        full_attention_layer_ids=FULL_LAYERS,
        device="cpu",
    )
    return SWATokenToKVPoolAllocator(
        NUM_FULL_TOKENS, NUM_WINDOW_TOKENS, 1, torch.float32, "cpu", pool, need_sort=False
    )


def build_elastic(directory: Path) -> tuple[SglangEngine, Any]:
    ours = make_engine(
        directory, num_pools=2, host_pool=PAGE_BYTES * NUM_PAGES, page_bytes=PAGE_BYTES
    )
    with hooked(
        ours,
        (MHATokenToKVPool, "_create_buffers", hooks.create_buffers),
        (TokenToKVPoolAllocator, "__init__", hooks.allocator_init),
        (SWATokenToKVPoolAllocator, "__init__", hooks.two_pools_init),
    ):
        return ours, build()


def close(engine: SglangEngine, allocator: Any) -> None:
    pool = allocator.get_kvcache()
    for part in (pool.full_kv_pool, pool.swa_kv_pool):
        part.k_buffer.clear()
        part.v_buffer.clear()
    assert engine.memory is not None
    engine.memory.close()
    engine.close()


@dataclass
class Tokens:
    """Tokens of a request: the first of them may have left the window."""

    ids: torch.Tensor
    mark: float
    num_left: int = 0


NO_CACHE = SimpleNamespace(
    supports_mamba=lambda: False,
    supports_swa=lambda: True,
    full_evictable_size=lambda: 0,
    swa_evictable_size=lambda: 0,
)


class TwoPools(RuleBasedStateMachine):
    """Both get the same calls; neighbours take pages from ours."""

    @initialize()
    def start(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        os.chmod(self.folder.name, 0o700)  # noqa: PTH101
        self.theirs = build()
        self.engine, self.ours = build_elastic(Path(self.folder.name) / "kv")
        let_schedule(self.engine, NO_CACHE)
        self.requests: list[tuple[Tokens, Tokens]] = []
        self.mark = 0.0
        self.look()

    def look(self) -> None:
        self.engine.memory.keeper.wait()  # what was given is free once it is unmapped
        self.engine.ranks.look()

    @rule(num_tokens=st.integers(1, 90))
    def begin(self, num_tokens: int) -> None:
        self.look()
        self.mark += 1
        found = [allocator.alloc(num_tokens) for allocator in (self.theirs, self.ours)]
        assert (found[0] is None) == (found[1] is None)
        if found[0] is None:
            return
        tell(self.engine)
        theirs, ours = (Tokens(ids, self.mark) for ids in found)
        for allocator, tokens in ((self.theirs, theirs), (self.ours, ours)):
            for plane, ids in planes(allocator, tokens):
                plane[ids] = tokens.mark
        self.requests.append((theirs, ours))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def leave_the_window(self, data: st.DataObject) -> None:
        pair = data.draw(st.sampled_from(self.requests))
        number = data.draw(st.integers(0, len(pair[0].ids) - pair[0].num_left))
        for allocator, tokens in zip((self.theirs, self.ours), pair, strict=True):
            allocator.free_swa(tokens.ids[tokens.num_left : tokens.num_left + number])
            tokens.num_left += number

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        pair = self.requests.pop(data.draw(st.integers(0, len(self.requests) - 1)))
        for allocator, tokens in zip((self.theirs, self.ours), pair, strict=True):
            free_full = getattr(allocator, "free_full", allocator.free)  # up to 0.5.15 one for all
            free_full(tokens.ids[: tokens.num_left])
            allocator.free(tokens.ids[tokens.num_left :])

    @rule(num_pages=st.integers(1, NUM_PAGES))
    def give(self, num_pages: int) -> None:
        """A neighbour wants pages: only empty ones go, for there is no cache."""
        self.engine.giving.give(WantedPages(num_pages, 0))
        self.engine.memory.keeper.wait()

    @invariant()
    def sizes_are_the_same(self) -> None:
        self.look()
        assert self.ours.full_available_size() == self.theirs.full_available_size()
        assert self.ours.swa_available_size() == self.theirs.swa_available_size()

    @invariant()
    def what_was_written_is_there(self) -> None:
        for _, tokens in self.requests:
            for plane, ids in planes(self.ours, tokens):
                assert bool((plane[ids, 0, 0] == tokens.mark).all())
                assert bool((plane[ids, -1, -1] == tokens.mark).all())

    @invariant()
    def open_pages_are_one_pools_each_and_resident(self) -> None:
        full, window = (one.pages for one in self.engine.free_lists)
        of_full, of_window = set(full.open_pages), set(window.open_pages)
        assert not of_full & of_window
        assert 0 not in of_full | of_window
        assert set(self.engine.memory.arena.resident_pages) == {0} | of_full | of_window

    def teardown(self) -> None:
        close(self.engine, self.ours)
        self.folder.cleanup()


def planes(allocator: Any, tokens: Tokens) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return each plane of both pools with the ids at which it holds `tokens`."""
    pool = allocator.get_kvcache()
    in_window = allocator.translate_loc_from_full_to_swa(tokens.ids[tokens.num_left :])
    assert bool((in_window > 0).all())
    return [
        (plane, ids)
        for part, ids in ((pool.full_kv_pool, tokens.ids), (pool.swa_kv_pool, in_window))
        for plane in (*part.k_buffer, *part.v_buffer)
    ]


TestTwoPools = TwoPools.TestCase
TestTwoPools.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)


def test_more_than_there_is_is_promised_to_both_pools_alike(tmp_path: Path) -> None:
    engine, allocator = build_elastic(tmp_path / "kv")
    request = SimpleNamespace(
        origin_input_ids=[7] * 300,
        output_ids=[],
        sampling_params=SimpleNamespace(max_new_tokens=8),
    )
    scheduler = SimpleNamespace(
        running_batch=SimpleNamespace(reqs=[]),
        last_batch=None,
        chunked_req=None,
        waiting_queue=[request] * 4,
        tree_cache=NO_CACHE,
    )
    engine.port.scheduler = scheduler
    engine.before_schedule()
    assert allocator.full_available_size() >= 2 * NUM_WINDOW_TOKENS - 100
    assert allocator.swa_available_size() == NUM_WINDOW_TOKENS
    close(engine, allocator)


def test_pages_of_a_window_go_only_when_the_copy_of_their_tokens_has_ended(tmp_path: Path) -> None:
    engine, allocator = build_elastic(tmp_path / "kv")
    let_schedule(engine, NO_CACHE)
    engine.memory.keeper.wait()
    engine.ranks.look()
    tokens = allocator.alloc(90)
    tell(engine)
    in_window = allocator.translate_loc_from_full_to_swa(tokens)
    pools = [
        SimpleNamespace(name="swa", device_indices=in_window[-1:], indices_from_pool=None),
        SimpleNamespace(name="draft", device_indices=tokens, indices_from_pool="kv"),
    ]
    operation = SimpleNamespace(device_indices=tokens[:0], pool_transfers=pools)
    host = SimpleNamespace(size_per_token=1, size=9, available_size=lambda: 9)
    controller = SimpleNamespace(
        write_queue=[operation],
        ack_write_queue=[],
        ack_load_queue=[],
        storage_backend=None,
        mem_pool_host=host,
    )
    copies = OpenCopies(engine, None)
    copies.store(controller, lambda: controller.ack_write_queue.append(SimpleNamespace()))
    full, window = (one.pages for one in engine.free_lists)
    assert [copies.num_locked(number) for number in range(2)] == [0, 1]
    assert window.num_open_pages > 1
    allocator.free(tokens)
    engine.giving.give(WantedPages(NUM_PAGES, 0))
    assert [*window.open_pages] == [int(in_window[-1]) // window.geometry.ids_per_page]
    assert not full.num_open_pages
    controller.ack_write_queue.clear()
    copies.settle()
    engine.giving.give(WantedPages(NUM_PAGES, 0))
    assert not window.num_open_pages
    close(engine, allocator)
