"""SGLang's KV pool, allocator and radix caches over our arena answer as the unpatched ones do.

Two sets of SGLang's own classes serve the same requests: one as SGLang makes them, one over an
arena, with a ledger and with neighbours that want memory back. Whatever is found in a cache must be
what was written for exactly these tokens.
"""

import importlib
import os
import tempfile
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from helpers.sglang_elastic import hooked, let_schedule, make_engine, tell
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from kvcached_core.engine.ranks import WantedPages
from kvcached_core.units import MIB
from kvcached_sglang import hooks
from kvcached_sglang.engine import SglangEngine

pytestmark = pytest.mark.sglang

NUM_PAGES = 8
BLOCKS_PER_PAGE = 32
NUM_LAYERS = 2
NUM_HEADS = 2
PAGE_BYTES = 2 * MIB  # the granularity


@dataclass
class Parts:
    """What SGLang keeps keys and values in, and finds them by."""

    pool: Any
    allocator: Any
    cache: Any

    def match(self, tokens: list[int]) -> tuple[torch.Tensor, Any]:
        """Return the ids of the longest cached prefix and the node that it ends at."""
        found = self.cache.match_prefix(MatchPrefixParams(key=key_of(tokens)))
        if hasattr(found, "device_indices"):
            return found.device_indices, found.last_device_node
        return self.cache.path_device_indices(found.last_device_node), found.last_device_node

    def alloc(self, num_tokens: int) -> Any:
        """Return ids, after evicting what is missing; None if that is not enough."""
        if self.allocator.available_size() < num_tokens:
            self.evict(num_tokens - self.allocator.available_size())
        return self.allocator.alloc(num_tokens)

    def evict(self, num_tokens: int) -> None:
        self.cache.evict(EvictParams(num_tokens=num_tokens))

    def write(self, ids: torch.Tensor, marks: torch.Tensor) -> None:
        for number, plane in enumerate([*self.pool.k_buffer, *self.pool.v_buffer]):
            plane[ids] = (marks + number)[:, None, None]

    def holds(self, ids: torch.Tensor, marks: torch.Tensor) -> bool:
        planes = [*self.pool.k_buffer, *self.pool.v_buffer]
        return all(
            bool((plane[ids] == (marks + number)[:, None, None]).all())
            for number, plane in enumerate(planes)
        )


def key_of(tokens: list[int]) -> RadixKey:
    return RadixKey(array("q", tokens), None)


def marks_of(tokens: list[int], first: int = 0) -> torch.Tensor:
    """Return a number for each token that depends on all tokens up to it."""
    marks, mark = [], 1
    for token in tokens:
        mark = (mark * 31 + token + 7) % 1_000_003
        marks.append(mark)
    return torch.tensor(marks[first:], dtype=torch.float32)


def component_types() -> Any:
    for name in ("unified_cache.component_type", "unified_cache_components"):
        try:
            return importlib.import_module(f"sglang.srt.mem_cache.{name}").ComponentType
        except ModuleNotFoundError:
            continue
    raise AssertionError("no ComponentType in this release")


def head_dim(block_tokens: int) -> int:
    """Return the head size with which `BLOCKS_PER_PAGE` blocks fill a page."""
    num_planes = 2 * NUM_LAYERS
    row_bytes = PAGE_BYTES // (BLOCKS_PER_PAGE * num_planes * block_tokens)
    return row_bytes // (NUM_HEADS * torch.float32.itemsize)


def build(cache: Any, block_tokens: int) -> Parts:
    size = (NUM_PAGES * BLOCKS_PER_PAGE - 1) * block_tokens
    pool = MHATokenToKVPool(
        size=size,
        page_size=block_tokens,
        dtype=torch.float32,
        head_num=NUM_HEADS,
        head_dim=head_dim(block_tokens),
        layer_num=NUM_LAYERS,
        device="cpu",
        enable_memory_saver=False,
    )
    if block_tokens == 1:
        allocator = TokenToKVPoolAllocator(size, torch.float32, "cpu", pool, need_sort=False)
    else:
        allocator = PagedTokenToKVPoolAllocator(
            size, block_tokens, torch.float32, "cpu", pool, need_sort=False
        )
    parameters = CacheInitParams(
        disable=False,
        req_to_token_pool=None,
        token_to_kv_pool_allocator=allocator,
        page_size=block_tokens,
    )
    if cache is UnifiedRadixCache:
        parameters.tree_components = (component_types().FULL,)
    return Parts(pool, allocator, cache(parameters))


def build_elastic(cache: Any, block_tokens: int, directory: Path) -> tuple[SglangEngine, Parts]:
    ours = make_engine(directory, host_pool=PAGE_BYTES * NUM_PAGES, page_bytes=PAGE_BYTES)
    with hooked(
        ours,
        (MHATokenToKVPool, "_create_buffers", hooks.create_buffers),
        (TokenToKVPoolAllocator, "__init__", hooks.allocator_init),
        (PagedTokenToKVPoolAllocator, "__init__", hooks.allocator_init),
    ):
        return ours, build(cache, block_tokens)


class SameCaches(RuleBasedStateMachine):
    """Both sets get the same requests; neighbours take pages from ours."""

    cache: Any = RadixCache
    block_tokens = 1

    @initialize()
    def start(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        os.chmod(self.folder.name, 0o700)  # noqa: PTH101
        self.theirs = build(self.cache, self.block_tokens)
        self.engine, self.ours = build_elastic(
            self.cache, self.block_tokens, Path(self.folder.name) / "kv"
        )
        let_schedule(self.engine, self.ours.cache)
        self.pages = self.ours.allocator.free_list.pages
        self.served: list[list[int]] = []
        self.look()

    def look(self) -> None:
        self.engine.memory.keeper.wait()  # what was given is free once it is unmapped
        self.engine.ranks.look()

    @rule(syllables=st.lists(st.integers(0, 2), min_size=1, max_size=90))
    def serve(self, syllables: list[int]) -> None:
        tokens = [one for one in syllables for _ in range(self.block_tokens)]
        self.look()
        given = []
        for parts in (self.theirs, self.ours):
            held, node = parts.match(tokens)
            assert parts.holds(held, marks_of(tokens[: len(held)]))
            lock = parts.cache.inc_lock_ref(node)
            ids = parts.alloc(len(tokens) - len(held)) if len(held) < len(tokens) else held[:0]
            given.append((held, ids))
            tell(self.engine)  # as at the end of a schedule, before its step
            if ids is not None:
                parts.write(ids, marks_of(tokens, len(held)))
                value = torch.cat([held, ids])
                result = parts.cache.insert(
                    InsertParams(key=key_of(tokens), value=value, prev_prefix_len=len(held))
                )
                assert result.prefix_len == len(held)
            parts.cache.dec_lock_ref(node, lock.to_dec_params())
        (held, ids), (our_held, our_ids) = given
        assert len(held) == len(our_held)
        assert (ids is None) == (our_ids is None)
        if ids is not None:
            self.served.append(tokens)

    @rule(num_tokens=st.integers(1, 100))
    def evict(self, num_tokens: int) -> None:
        for parts in (self.theirs, self.ours):
            parts.evict(num_tokens)

    @rule(num_pages=st.integers(1, NUM_PAGES))
    def give(self, num_pages: int) -> None:
        """A neighbour wants pages: what ours evicts for it, theirs evicts, too."""
        evict, evicted = self.ours.cache.evict, []

        def evict_and_note(wanted: EvictParams) -> Any:
            evicted.append(wanted.num_tokens)
            return evict(wanted)

        before = self.pages.num_open_pages
        with patch.object(self.ours.cache, "evict", evict_and_note):
            self.engine.giving.give(WantedPages(num_pages, 0))
        for num_tokens in evicted:
            self.theirs.evict(num_tokens)
        assert before - self.pages.num_open_pages >= 0
        # Nothing runs, so all it holds is cache, and all that is wanted it can give.
        assert self.pages.num_open_pages <= max(1, before - num_pages)

    @rule()
    def flush(self) -> None:
        for parts in (self.theirs, self.ours):
            parts.cache.reset()
            parts.allocator.clear()

    @invariant()
    def what_is_cached_is_the_same_and_right(self) -> None:
        for tokens in self.served[-5:]:
            theirs, _ = self.theirs.match(tokens)
            ours, _ = self.ours.match(tokens)
            assert len(theirs) == len(ours)
            assert self.ours.holds(ours, marks_of(tokens[: len(ours)]))

    @invariant()
    def sizes_are_the_same(self) -> None:
        self.look()
        assert self.ours.cache.evictable_size() == self.theirs.cache.evictable_size()
        free_list = self.ours.allocator.free_list
        free_list.is_nominal = True
        assert self.ours.allocator.available_size() == self.theirs.allocator.available_size()
        free_list.is_nominal = False
        assert self.ours.allocator.available_size() == self.theirs.allocator.available_size()

    def teardown(self) -> None:
        for plane in (self.ours.pool.k_buffer, self.ours.pool.v_buffer):
            plane.clear()
        self.engine.memory.close()
        self.engine.close()
        self.folder.cleanup()


def machine(cache: Any, block_tokens: int) -> Any:
    kind = type("Machine", (SameCaches,), {"cache": cache, "block_tokens": block_tokens})
    case = kind.TestCase
    case.settings = settings(max_examples=12, stateful_step_count=30, deadline=None)
    return case


TestRadixCache = machine(RadixCache, 1)
TestRadixCachePaged = machine(RadixCache, 16)
TestUnifiedRadixCache = machine(UnifiedRadixCache, 1)
TestUnifiedRadixCachePaged = machine(UnifiedRadixCache, 16)
