"""Our block pool answers as vLLM's own does, apart from the ids, for any sequence of calls."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvcached_core.geometry import Geometry
from kvcached_core.page_pool import CACHED, IDLE, UNMAPPED, USED

pytestmark = pytest.mark.vllm

GEOMETRY = Geometry(block_bytes=1024, num_planes=4, ids_per_page=16, blocks_per_page=4)
NUM_PAGES = 8
NUM_BLOCKS = NUM_PAGES * GEOMETRY.blocks_per_page
BLOCK_SIZE = 4


class Source:
    """A ledger for one instance that may run dry."""

    def __init__(self, num_pages: int) -> None:
        self.num_left = num_pages

    def reserve(self, num_pages: int, *, is_urgent: bool, num_spare: int = 0) -> int:
        granted = min(num_pages + num_spare, self.num_left)
        self.num_left -= granted
        return granted

    def cancel(self, num_pages: int) -> None:
        self.num_left += num_pages


class FakeRequest:
    """The parts of a vLLM request that caching a block reads."""

    def __init__(self, content: int, num_blocks: int) -> None:
        self.block_hashes = [
            content.to_bytes(8, "big") + bytes([index]) for index in range(num_blocks)
        ]
        self.all_token_ids = list(range(num_blocks * BLOCK_SIZE))
        self.lora_request = None
        self.mm_features: list[Any] = []
        self.cache_salt = None
        self.session_id = None
        self.prompt_embeds = None


def make_pools(num_left: int = NUM_PAGES - 1, *, caching: bool = True, events: bool = True) -> Any:
    from vllm.v1.core.block_pool import BlockPool

    from kvcached_vllm.block_pool import ElasticBlockPool

    vanilla = BlockPool(NUM_BLOCKS, caching, BLOCK_SIZE, events)
    ours = ElasticBlockPool(GEOMETRY, Source(num_left), NUM_BLOCKS, caching, BLOCK_SIZE, events)
    return vanilla, ours


def free_of(pool: Any) -> int:
    """Return what vLLM calls free: our unmapped blocks can be had as well."""
    unmapped = len(pool.pages.pages_in(UNMAPPED)) * GEOMETRY.blocks_per_page
    return int(pool.get_num_free_blocks() - pool.pages.num_promised_blocks + unmapped)


class BlockPoolMachine(RuleBasedStateMachine):
    """Two pools side by side; `live` holds each request's blocks in both."""

    @initialize(caching=st.booleans())
    def start(self, *, caching: bool) -> None:
        self.vanilla, self.ours = make_pools(caching=caching)
        self.caching = caching
        self.live: list[tuple[int, list[Any], list[Any]]] = []
        self.contents = 0

    def both(self, call: Callable[[Any], Any]) -> tuple[Any, Any]:
        return call(self.vanilla), call(self.ours)

    @rule(num_blocks=st.integers(0, 12), content=st.integers(0, 3))
    def allocate(self, num_blocks: int, content: int) -> None:
        request = FakeRequest(content, num_blocks)
        hit_v, hit_o = self.both(lambda pool: self.hits(pool, request))
        assert len(hit_v) == len(hit_o)
        self.vanilla.touch(hit_v)
        self.ours.touch(hit_o)
        missing = num_blocks - len(hit_v)
        if missing > self.vanilla.get_num_free_blocks():
            with pytest.raises(ValueError, match="Cannot get"):
                self.vanilla.get_new_blocks(missing)
            with pytest.raises(ValueError, match="Cannot get"):
                self.ours.get_new_blocks(missing)
            self.vanilla.free_blocks(reversed(hit_v))
            self.ours.free_blocks(reversed(hit_o))
            return
        new_v, new_o = self.both(lambda pool: pool.get_new_blocks(missing))
        assert len(new_o) == len(new_v)
        assert all(block.ref_cnt == 1 and block.block_hash is None for block in new_o)
        self.live.append((content, hit_v + new_v, hit_o + new_o))
        if self.caching:
            for pool, blocks in ((self.vanilla, hit_v + new_v), (self.ours, hit_o + new_o)):
                pool.cache_full_blocks(
                    request=request,
                    blocks=blocks,
                    num_cached_blocks=len(hit_v),
                    num_full_blocks=max(num_blocks - 1, len(hit_v)),
                    block_size=BLOCK_SIZE,
                    kv_cache_group_id=0,
                )

    def hits(self, pool: Any, request: FakeRequest) -> list[Any]:
        found: list[Any] = []
        for block_hash in request.block_hashes:
            cached = pool.get_cached_block(block_hash, [0])
            if cached is None:
                break
            found += cached
        return found

    @precondition(lambda self: self.live)
    @rule(data=st.data(), as_generator=st.booleans())
    def finish(self, data: st.DataObject, *, as_generator: bool) -> None:
        index = data.draw(st.integers(0, len(self.live) - 1))
        _, blocks_v, blocks_o = self.live.pop(index)
        for pool, blocks in ((self.vanilla, blocks_v), (self.ours, blocks_o)):
            pool.free_blocks(
                (block for block in reversed(blocks)) if as_generator else blocks[::-1]
            )

    @rule()
    def free_the_null_block(self) -> None:
        for pool in (self.vanilla, self.ours):
            pool.free_blocks([pool.null_block])

    @rule(content=st.integers(0, 3))
    def evict(self, content: int) -> None:
        request = FakeRequest(content, 3)
        for pool in (self.vanilla, self.ours):
            for block in self.hits(pool, request):  # one by one: vLLM's own order is a set's
                pool.evict_blocks({block.block_id})

    @rule()
    def reset(self) -> None:
        done_v, done_o = self.both(lambda pool: pool.reset_prefix_cache())
        assert done_v == done_o == (not any(blocks for _, blocks, _ in self.live))

    @rule()
    def schedule_ends(self) -> None:
        orders = self.ours.pages.drain()
        if orders is not None:
            self.ours.pages._source.num_left += len(orders.unmap_pages)

    @invariant()
    def answers_agree(self) -> None:
        if not hasattr(self, "ours"):
            return
        assert free_of(self.ours) == self.vanilla.get_num_free_blocks()
        assert self.ours.get_usage() == pytest.approx(self.vanilla.get_usage())
        assert len(self.ours.cached_block_hash_to_block) == len(
            self.vanilla.cached_block_hash_to_block
        )
        events_v, events_o = self.both(lambda pool: pool.take_events())
        assert [type(event) for event in events_o] == [type(event) for event in events_v]
        for event_v, event_o in zip(events_v, events_o, strict=True):
            assert getattr(event_o, "block_hashes", None) == getattr(event_v, "block_hashes", None)

    @invariant()
    def every_live_block_is_on_a_used_page(self) -> None:
        if not hasattr(self, "ours"):
            return
        used = set(self.ours.pages.pages_in(USED))
        for _, _, blocks in self.live:
            for block in blocks:
                assert GEOMETRY.exists(block.block_id)
                assert GEOMETRY.page_of(block.block_id) in used
                assert self.ours.blocks[block.block_id] is block


TestBlockPoolMachine = BlockPoolMachine.TestCase
TestBlockPoolMachine.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


def cache(pool: Any, content: int, num_blocks: int) -> list[Any]:
    request = FakeRequest(content, num_blocks)
    blocks = pool.get_new_blocks(num_blocks)
    pool.cache_full_blocks(
        request=request,
        blocks=blocks,
        num_cached_blocks=0,
        num_full_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        kv_cache_group_id=0,
    )
    return list(blocks)


def test_the_cache_lives_on_while_the_ledger_grants_pages() -> None:
    _, ours = make_pools()
    ours.free_blocks(reversed(cache(ours, 1, 8)))
    ours.get_new_blocks(16)
    assert len(ours.cached_block_hash_to_block) == 8


def test_a_dry_ledger_means_eviction_in_vllms_order_not_failure() -> None:
    _, ours = make_pools(num_left=2)
    ours.free_blocks(reversed(cache(ours, 1, 8)))
    blocks = ours.get_new_blocks(7)
    assert len(ours.cached_block_hash_to_block) == 4
    assert ours.get_num_free_blocks() == 4
    with pytest.raises(ValueError, match="Cannot get 5 free blocks"):
        ours.get_new_blocks(5)
    assert ours.get_num_free_blocks() == 4
    ours.free_blocks(blocks)


def test_released_pages_are_those_whose_blocks_were_unused_longest() -> None:
    _, ours = make_pools()
    first, second = cache(ours, 1, 8), cache(ours, 2, 8)
    ours.free_blocks(reversed(second))
    ours.free_blocks(reversed(first))
    assert ours.release_pages(1) == 1
    request = FakeRequest(1, 8)
    assert all(ours.get_cached_block(h, [0]) for h in request.block_hashes)
    assert len(ours.cached_block_hash_to_block) < 16
    assert ours.release_pages(100) == len(first + second) // 4 - 1
    assert ours.pages.pages_in(IDLE) == []


def test_a_page_is_as_young_as_its_youngest_block() -> None:
    _, ours = make_pools()
    first, second = cache(ours, 1, 8), cache(ours, 2, 8)
    page_of = GEOMETRY.page_of
    (shared,) = {page_of(b.block_id) for b in first} & {page_of(b.block_id) for b in second}
    on_shared = [block for block in first if page_of(block.block_id) == shared]
    ours.free_blocks(on_shared)  # the oldest block of all, on a page with younger ones
    ours.free_blocks(reversed(second))
    ours.free_blocks(block for block in first if block not in on_shared)
    num_younger = len({page_of(block.block_id) for block in second}) - 1
    assert ours.release_pages(num_younger) == num_younger
    assert shared in ours.pages.pages_in(CACHED)


def test_pages_go_one_by_one_so_that_who_asked_gets_the_first_early() -> None:
    _, ours = make_pools()
    ours.free_blocks(reversed(cache(ours, 1, 12)))
    num_cached = len(ours.pages.pages_in(CACHED))
    going = ours.release_one_by_one(100)
    assert next(going) == 1
    assert len(ours.pages.pages_in(CACHED)) == num_cached - 1
    assert list(going) == list(range(2, num_cached + 1))


def test_a_reset_frees_every_page_but_the_first() -> None:
    _, ours = make_pools()
    ours.free_blocks(reversed(cache(ours, 1, 12)))
    assert ours.reset_prefix_cache()
    assert (orders := ours.pages.drain()) is not None
    assert ours.pages.num_resident_pages == 1
    assert (orders.num_used_pages, orders.num_cached_pages) == (1, 0)


def test_an_id_in_a_gap_is_no_block() -> None:
    _, ours = make_pools()
    with pytest.raises(IndexError, match="does not exist"):
        ours.blocks[GEOMETRY.blocks_per_page]
