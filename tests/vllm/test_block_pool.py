"""Our block pool answers as vLLM's own does, apart from the ids, for any sequence of calls."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.page_source import CountingSource, TakenByNeighbours
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvcached_core.engine.free_lists import CACHED, CLOSED, EMPTY, USED
from kvcached_core.engine.giving import Giving
from kvcached_core.memory.geometry import Geometry
from kvcached_core.memory.orders import PageOrders

pytestmark = [pytest.mark.vllm, pytest.mark.older_release]

GEOMETRY = Geometry(block_bytes=1024, num_planes=4, ids_per_page=16, blocks_per_page=4)
NUM_PAGES = 8
NUMBERS_OF_PAGES = [7, 8, 15, 16, 31, 33]
NUMBERS_OF_BLOCKS = [1, 2, 3, 4, 7, 64]  # a page
BLOCK_SIZE = 4


class FakeRequest:
    """The parts of a vLLM request that caching a block reads."""

    def __init__(self, content: int, num_blocks: int) -> None:
        self.block_hashes = [
            content.to_bytes(8, "big") + index.to_bytes(2, "big") for index in range(num_blocks)
        ]
        self.all_token_ids = list(range(num_blocks * BLOCK_SIZE))
        self.lora_request = None
        self.mm_features: list[Any] = []
        self.cache_salt = None
        self.session_id = None
        self.prompt_embeds = None


def make_pools(
    num_left: int = NUM_PAGES - 1,
    *,
    geometry: Geometry = GEOMETRY,
    num_pages: int = NUM_PAGES,
    caching: bool = True,
    events: bool = True,
    **options: Any,
) -> Any:
    from vllm.v1.core.block_pool import BlockPool

    from kvcached_vllm.block_pool import ElasticBlockPool

    sizes = num_pages * geometry.blocks_per_page, caching, BLOCK_SIZE, events
    return BlockPool(*sizes), ElasticBlockPool(
        geometry, CountingSource(num_left), *sizes, options=options
    )


def make_geometry(blocks_per_page: int) -> Geometry:
    return Geometry(1024, 2, 2 * blocks_per_page + 1, blocks_per_page)


def free_of(pool: Any) -> int:
    """Return what vLLM calls free: our unmapped blocks can be had as well."""
    pages = pool.pages
    num_closed = (pages.num_pages - pages.num_open_pages) * pages.geometry.blocks_per_page
    return int(pool.get_num_free_blocks() - pages.num_ready_blocks + num_closed)


def hits_of(pool: Any, request: FakeRequest) -> list[Any]:
    found: list[Any] = []
    for block_hash in request.block_hashes:
        cached = pool.get_cached_block(block_hash, [0])
        if cached is None:
            break
        found += cached
    return found


def cache_blocks(pool: Any, request: FakeRequest, blocks: list[Any], num_hits: int) -> None:
    """Let the prefix cache have what a request computed, all but its last block."""
    pool.cache_full_blocks(
        request=request,
        blocks=blocks,
        num_cached_blocks=num_hits,
        num_full_blocks=max(len(blocks) - 1, num_hits),
        block_size=BLOCK_SIZE,
        kv_cache_group_id=0,
    )


def num_idle(pool: Any) -> int:
    return len(pool.pages._spare) + len(pool.free_lists.pages_in(EMPTY))


def num_cached(pool: Any) -> int:
    return len(pool.free_lists.pages_in(CACHED))


def end_schedule(pool: Any) -> PageOrders | None:
    is_live = pool.num_used_blocks > 0
    pool.pages.end_schedule(is_live=is_live)
    orders: PageOrders | None = pool.pages.book.take_orders(pool.pages.count_pages, is_live=is_live)
    return orders


def giving_of(pool: Any) -> Giving:
    """Return what gives pages of a pool, as the pool's engine has it."""
    port: Any = SimpleNamespace(
        evict=pool.evict_pages,
        num_idle_blocks=lambda: 0,
        num_locked_blocks=lambda _: 0,
        end_copies=lambda: False,
    )
    ranks: Any = SimpleNamespace(clock=lambda: 0.0)
    return Giving(ranks, port, [pool.pages], lambda **_: None)


def check_pages(pool: Any, live: list[Any]) -> None:
    """Bring the books up to date and compare them with who holds which block."""
    pages, geometry = pool.pages, pool.pages.geometry
    free_lists = pool.free_lists
    states = {state: free_lists.pages_in(state) for state in (CLOSED, USED, CACHED, EMPTY)}
    assert sorted(page for found in states.values() for page in found) == list(
        range(pages.num_pages)
    )
    assert sorted([*pages.book._unmapped, *pages._spare]) == states[CLOSED]
    held = {geometry.page_of(block.block_id) for block in live} | {0}
    queued = [block.block_id for block in pool.free_block_queue.get_all_free_blocks()]
    assert set(states[USED]) == held
    assert set(states[CACHED]) == {geometry.page_of(block_id) for block_id in queued} - held
    free = [block.block_id for blocks in free_lists._lists for block in blocks]
    taken = {block.block_id for block in live}
    assert len(free) == free_lists.num_free
    assert pool.num_used_blocks == len(taken)
    assert pool.num_idle_blocks == len(free) + len(queued)
    places = sorted([*free, *queued, *taken, 0])
    opened = [page for page in range(pages.num_pages) if page not in states[CLOSED]]
    assert places == [
        page * geometry.ids_per_page + index
        for page in opened
        for index in range(geometry.blocks_per_page)
    ]
    assert all(pool.blocks[block_id].ref_cnt == 0 for block_id in (*free, *queued))
    assert all(pool.blocks[block.block_id] is block and block.ref_cnt > 0 for block in live)


class BlockPoolMachine(RuleBasedStateMachine):
    """Two pools side by side; `live` holds each request's blocks in both.

    Several rules may run before the books of the pages are looked at.
    """

    @initialize(
        caching=st.booleans(),
        num_pages=st.sampled_from(NUMBERS_OF_PAGES),
        blocks_per_page=st.sampled_from(NUMBERS_OF_BLOCKS),
    )
    def start(self, *, caching: bool, num_pages: int, blocks_per_page: int) -> None:
        self.num_blocks = num_pages * blocks_per_page
        self.vanilla, self.ours = make_pools(
            num_pages - 1,
            geometry=make_geometry(blocks_per_page),
            num_pages=num_pages,
            caching=caching,
        )
        self.caching = caching
        self.live: list[tuple[int, list[Any], list[Any]]] = []
        self.contents = 0

    def both(self, call: Callable[[Any], Any]) -> tuple[Any, Any]:
        return call(self.vanilla), call(self.ours)

    @rule(num_blocks=st.integers(0, 12), content=st.integers(0, 3))
    def allocate(self, num_blocks: int, content: int) -> None:
        self.begin(num_blocks, content)

    @rule(share=st.sampled_from([1, 2, 3]), content=st.integers(0, 3))
    def allocate_much(self, share: int, content: int) -> None:
        self.begin(self.num_blocks // share, content)

    @rule()
    def allocate_all(self) -> None:
        """Fill the pool: what comes next has to evict, or finds nothing."""
        self.begin(self.vanilla.get_num_free_blocks(), 4)

    def begin(self, num_blocks: int, content: int) -> None:
        request = FakeRequest(content, num_blocks)
        hit_v, hit_o = self.both(lambda pool: hits_of(pool, request))
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
            cache_blocks(self.vanilla, request, hit_v + new_v, len(hit_v))
            cache_blocks(self.ours, request, hit_o + new_o, len(hit_o))

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
            for block in hits_of(pool, request):  # one by one: vLLM's own order is a set's
                pool.evict_blocks({block.block_id})

    @rule()
    def reset(self) -> None:
        done_v, done_o = self.both(lambda pool: pool.reset_prefix_cache())
        assert done_v == done_o == (not any(blocks for _, blocks, _ in self.live))

    @rule()
    def schedule_ends(self) -> None:
        self.ours.pages._source.settle(end_schedule(self.ours))

    @rule(num_pages=st.integers(0, 9))
    def give_empty_pages(self, num_pages: int) -> None:
        self.ours.pages.close_empty(num_pages)
        self.schedule_ends()  # what is given goes at once

    @rule()
    def look_at_the_pages(self) -> None:
        check_pages(self.ours, [block for _, _, blocks in self.live for block in blocks])

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
    def no_page_and_no_promise_is_made_up(self) -> None:
        if hasattr(self, "ours"):
            check_what_needs_no_settling(self.ours)

    def teardown(self) -> None:
        if hasattr(self, "ours"):
            self.look_at_the_pages()


def check_what_needs_no_settling(pool: Any) -> None:
    pages = pool.pages
    assert pool.free_lists._dirty <= set(range(pages.num_pages))
    assert 0 <= pages.num_promised <= len(pages.book._unmapped)
    assert pages._source.num_left >= 0
    assert min(pool.free_lists._num_cached) >= 0


TestBlockPoolMachine = BlockPoolMachine.TestCase
TestBlockPoolMachine.settings = settings(max_examples=75, stateful_step_count=40, deadline=None)


class DryPoolMachine(TakenByNeighbours, RuleBasedStateMachine):
    """One pool, and neighbours that take pages of its ledger and want more back."""

    @initialize(
        num_pages=st.sampled_from(NUMBERS_OF_PAGES),
        blocks_per_page=st.sampled_from(NUMBERS_OF_BLOCKS),
        share=st.sampled_from([1, 2, 4]),
        low=st.integers(0, 2),
        high=st.integers(0, 4),
    )
    def start(self, num_pages: int, blocks_per_page: int, share: int, low: int, high: int) -> None:
        self.num_pages = num_pages
        _, self.pool = make_pools(
            (num_pages - 1) // share,
            geometry=make_geometry(blocks_per_page),
            num_pages=num_pages,
            min_spare_pages=low,
            max_spare_pages=high,
        )
        self.source = self.pool.pages._source
        self.total = self.source.num_left + 1
        self.mapped = {0}
        self.live: list[list[Any]] = []

    @rule(num_blocks=st.integers(0, 12), content=st.integers(0, 3), is_waiting=st.booleans())
    def allocate(self, num_blocks: int, content: int, *, is_waiting: bool) -> None:
        request = FakeRequest(content, num_blocks)
        hits = hits_of(self.pool, request)
        self.pool.touch(hits)
        missing = num_blocks - len(hits)
        if is_waiting:
            self.pool.pages.promise_blocks(missing, is_urgent=True)
        try:
            blocks = hits + self.pool.get_new_blocks(missing)
        except ValueError:
            assert missing > self.pool.get_num_free_blocks()
            self.pool.free_blocks(reversed(hits))
            return
        assert len({block.block_id for block in blocks}) == num_blocks
        self.live.append(blocks)
        cache_blocks(self.pool, request, blocks, len(hits))

    @rule()
    def allocate_all(self) -> None:
        self.live.append(self.pool.get_new_blocks(self.pool.get_num_free_blocks()))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.live) - 1))
        self.pool.free_blocks(reversed(self.live.pop(index)))

    @rule(num_pages=st.integers(0, 40))
    def release(self, num_pages: int) -> None:
        idle, cached = num_idle(self.pool), num_cached(self.pool)
        assert giving_of(self.pool).close(num_pages) == min(num_pages, idle + cached)

    @rule(num_pages=st.integers(0, 4))
    def owe_and_pay(self, num_pages: int) -> None:
        idle, cached = num_idle(self.pool), num_cached(self.pool)
        giving = giving_of(self.pool)
        giving.owed_pages = num_pages
        has_more = self.pool.pages.num_resident_pages > 1 + idle + cached  # page 0 never goes
        num_owed = max(num_pages - idle - cached, 0) if has_more else 0
        assert giving.pay() == (not num_owed)
        assert giving.owed_pages == num_owed

    @rule()
    def schedule_ends(self) -> None:
        orders = end_schedule(self.pool)
        self.source.settle(orders)
        if orders is not None:
            new = {*orders.map_pages, *orders.spare_pages}
            assert not new & self.mapped
            assert self.mapped >= {*orders.unmap_pages, *orders.ready_pages}
            self.mapped = (self.mapped | new) - {*orders.unmap_pages}
        assert self.mapped <= set(range(self.num_pages))
        assert self.source.num_promised == 0
        assert self.source.num_left + self.num_of_neighbours + len(self.mapped) == self.total

    @rule()
    def look_at_the_pages(self) -> None:
        check_pages(self.pool, [block for blocks in self.live for block in blocks])

    @invariant()
    def no_page_and_no_promise_is_made_up(self) -> None:
        if hasattr(self, "pool"):
            check_what_needs_no_settling(self.pool)

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            self.look_at_the_pages()
            self.schedule_ends()


TestDryPoolMachine = DryPoolMachine.TestCase
TestDryPoolMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize(("num_idle", "is_paid", "num_left"), [(2, True, 0), (1, False, 1)])
def test_what_is_owed_is_paid_with_idle_pages_and_the_rest_stays_owed(
    num_idle: int, num_left: int, *, is_paid: bool
) -> None:
    _, ours = make_pools(caching=False)
    per_page = GEOMETRY.blocks_per_page
    ours.get_new_blocks(per_page)
    ours.free_blocks(ours.get_new_blocks(num_idle * per_page))
    giving = giving_of(ours)
    giving.owed_pages = 2
    assert giving.pay() is is_paid
    assert giving.owed_pages == num_left


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
    assert giving_of(ours).close(1) == 1
    request = FakeRequest(1, 8)
    assert all(ours.get_cached_block(h, [0]) for h in request.block_hashes)
    assert len(ours.cached_block_hash_to_block) < 16
    assert giving_of(ours).close(100) == len(first + second) // 4 - 1
    assert num_idle(ours) == 0


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
    assert giving_of(ours).close(num_younger) == num_younger
    assert shared in ours.free_lists.pages_in(CACHED)


def test_pages_that_a_tier_has_too_are_given_before_older_ones_and_taken_in_vllms_order() -> None:
    _, ours = make_pools(num_left=4)
    older, younger = cache(ours, 1, 8), cache(ours, 2, 8)
    for blocks in (older, younger):
        ours.free_blocks(reversed(blocks))
    copied = {block.block_id for block in younger}
    ours.is_copied = lambda block: block.block_id in copied
    page_of = GEOMETRY.page_of
    of_older, of_younger = ({page_of(b.block_id) for b in each} for each in (older, younger))
    num_younger = len(of_younger - of_older)
    assert giving_of(ours).close(num_younger) == num_younger
    assert all(ours.get_cached_block(h, [0]) for h in FakeRequest(1, 8).block_hashes)
    ours.free_blocks(ours.get_new_blocks(ours.get_num_free_blocks()))
    assert ours.get_cached_block(FakeRequest(1, 8).block_hashes[-1], [0]) is None


def test_cached_pages_are_emptied_as_few_as_are_wanted_and_are_not_closed_yet() -> None:
    _, ours = make_pools()
    ours.free_blocks(reversed(cache(ours, 1, 12)))
    num_before, num_open = num_cached(ours), ours.pages.num_open_pages
    assert ours.evict_pages(1)
    assert (num_cached(ours), ours.pages.num_open_pages) == (num_before - 1, num_open)
    assert ours.evict_pages(100)
    assert num_cached(ours) == 0
    assert not ours.evict_pages(100)


@pytest.mark.parametrize("num_cached_blocks", [0, 6])
def test_what_a_request_needs_beside_what_can_be_had_is_promised_and_no_more(
    num_cached_blocks: int,
) -> None:
    _, ours = make_pools(num_left=NUM_PAGES - 1)
    ours.free_blocks(reversed(cache(ours, 1, num_cached_blocks)))
    ours.pages.cancel()
    num_left, num_idle_blocks = ours.pages._source.num_left, ours.num_idle_blocks
    ours.promise_blocks(num_idle_blocks)
    assert ours.pages._source.num_left == num_left
    ours.promise_blocks(num_idle_blocks + 5)
    assert ours.pages._source.num_left == num_left - 2
    assert ours.get_num_free_blocks() == num_idle_blocks + 8
    ours.promise_blocks(num_idle_blocks + 8)
    assert ours.pages._source.num_left == num_left - 2


def test_a_reset_frees_every_page_but_the_first() -> None:
    _, ours = make_pools()
    ours.free_blocks(reversed(cache(ours, 1, 12)))
    assert ours.reset_prefix_cache()
    assert (orders := end_schedule(ours)) is not None
    assert ours.pages.num_resident_pages == 1
    assert (orders.num_used_pages, orders.num_cached_pages) == (1, 0)


def test_an_id_in_a_gap_is_no_block() -> None:
    _, ours = make_pools()
    with pytest.raises(IndexError, match="does not exist"):
        ours.blocks[GEOMETRY.blocks_per_page]


@pytest.mark.parametrize("prepend", [True, False])
def test_cached_blocks_that_are_freed_with_prepend_are_evicted_first(*, prepend: bool) -> None:
    _, pool = make_pools()
    older, younger = pool.get_new_blocks(2), pool.get_new_blocks(2)
    for content, blocks in enumerate((older, younger)):
        cache_blocks(pool, FakeRequest(content, 3), [*blocks, None], 0)
    pool.free_blocks(older)
    pool.free_blocks(younger, prepend=prepend)
    order = [*younger, *older] if prepend else [*older, *younger]
    assert pool.free_block_queue.get_all_free_blocks() == order


def test_the_null_block_is_never_free_however_it_is_held() -> None:
    _, ours = make_pools()
    num_free = ours.get_num_free_blocks()
    ours.null_block.ref_cnt = 0
    ours.touch([ours.null_block])
    ours.free_blocks([ours.null_block])
    assert ours.get_num_free_blocks() == num_free
    taken = ours.get_new_blocks(NUM_PAGES * GEOMETRY.blocks_per_page - 1)
    assert ours.null_block not in taken


def test_no_more_pages_are_given_than_are_wanted_idle_ones_first() -> None:
    _, ours = make_pools()
    per_page = GEOMETRY.blocks_per_page
    ours.get_new_blocks(per_page - 1)  # page 0 is full
    ours.free_blocks(reversed(cache(ours, 1, 3 * per_page)))
    ours.free_blocks(ours.get_new_blocks(per_page))
    assert (num_idle(ours), num_cached(ours)) == (1, 3)
    assert giving_of(ours).close(2) == 2
    assert (num_idle(ours), num_cached(ours)) == (0, 2)
