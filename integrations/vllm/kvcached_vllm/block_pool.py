"""vLLM's block pool over elastic pages.

A block that holds nothing is in our free lists; a block that only the prefix cache wants is in
vLLM's own `free_block_queue`, in vLLM's own order of eviction. So which blocks a request hits, and
which cached block goes first, is what it is without us; only the ids differ, and the cache is not
touched while the ledger still grants pages.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue, KVCacheBlock

from kvcached_core.engine.free_lists import CACHED, FreeLists
from kvcached_core.engine.giving import Giving
from kvcached_core.engine.pages import Pages
from kvcached_core.engine.port import PageSource
from kvcached_core.engine.sparse_blocks import SparseBlocks
from kvcached_core.memory.geometry import Geometry


class ElasticBlockPool(BlockPool):
    """A `BlockPool` whose blocks exist only while their page is resident.

    Args:
        geometry: How blocks lie in pages.
        source: Who promises pages; it has promised and mapped page 0 already.
        *args: What vLLM gives its own pool.
        options: What `Pages` takes beside.
        **kwargs: As `args`.
    """

    blocks: Any
    num_gpu_blocks: int
    engine: Any  # the `VllmEngine` that built it, and what it gives
    giving: Giving
    is_copied: Callable[[KVCacheBlock], bool] | None = None  # whether a tier has a block, too
    frees_late = True  # blocks in front of a sliding window: docs/adr/0007

    def __init__(
        self,
        geometry: Geometry,
        source: PageSource,
        *args: Any,
        options: Mapping[str, Any],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        for block in self.blocks:
            block.prev_free_block = block.next_free_block = None
        self.blocks = SparseBlocks(self.blocks, geometry)
        self.free_block_queue = FreeKVCacheBlockQueue([])
        num_pages = self.blocks.num_pages
        self.num_gpu_blocks = num_pages * geometry.blocks_per_page
        self.free_lists: FreeLists[KVCacheBlock] = FreeLists(
            geometry, num_pages, self.blocks.on_page
        )
        self.pages = Pages(geometry, num_pages, source, self.free_lists, **options)
        self._in_hand = self.free_lists.in_hand
        self._take_in_hand = self.free_lists.take_in_hand
        self._give_one = self.free_lists.give_one
        self.null_block = self.free_lists.take_one()
        self.num_used_blocks = 0  # of live requests; the null block is not counted
        self.num_evicted_pages = 0  # since the start
        self.num_groups = 1  # of layers, each of which takes blocks of its own

    @property
    def num_idle_blocks(self) -> int:
        """Blocks of open pages that hold nothing, or only what the prefix cache wants."""
        num_blocks: int = self.pages.num_open_blocks - self.num_used_blocks - 1
        return num_blocks

    def get_num_free_blocks(self) -> int:
        """Return the blocks that can be had without asking anybody: promised ones included."""
        pages = self.pages
        return pages.num_open_blocks - self.num_used_blocks - 1 + pages.num_ready_blocks

    def get_usage(self) -> float:
        """Return the share of the virtual capacity that live requests hold, from 0 to 1."""
        num_blocks: int = self.num_gpu_blocks - 1
        return self.num_used_blocks / num_blocks if num_blocks else 0.0

    def get_new_blocks(self, num_blocks: int) -> list[KVCacheBlock]:
        """Return `num_blocks` blocks: free ones, then those of new pages, then evicted ones.

        Raises:
            ValueError: If there are not as many, as vLLM's pool does.
        """
        collector = self.metrics_collector
        if num_blocks == 1 and not collector and (self._in_hand or self.free_lists.fill_hand()):
            one = self._take_in_hand()
            one.ref_cnt += 1
            self.num_used_blocks += 1
            return [one]
        blocks = self._take(num_blocks)
        for block in blocks:
            block.ref_cnt += 1
            if collector:
                if self.enable_caching:
                    collector.on_block_evicted(block)
                collector.on_block_allocated(block)
        self.num_used_blocks += num_blocks
        return blocks

    def free_blocks(
        self,
        ordered_blocks: Iterable[KVCacheBlock],
        prepend: bool = False,  # noqa: FBT001, FBT002  only 0.23 has it
    ) -> None:
        """Drop one reference to each block; vLLM orders them by who shall be evicted first.

        With `prepend` cached blocks go before all others. Blocks that hold nothing do so anyway.
        """
        caching, give_one = self.enable_caching, self._give_one
        num_dropped = 0
        cached = []
        for block in ordered_blocks:
            block.ref_cnt = ref_cnt = block.ref_cnt - 1
            if not ref_cnt and not block.is_null:
                num_dropped += 1
                if caching and block.block_hash is not None:
                    cached.append(block)
                else:
                    give_one(block)
        self.num_used_blocks -= num_dropped
        if cached:
            self.free_lists.add_cached(cached)
            queue = self.free_block_queue
            put = queue.prepend_n if prepend else queue.append_n
            put(cached)

    def touch(self, blocks: Sequence[KVCacheBlock]) -> None:
        """Add one reference to each block of a prefix-cache hit."""
        collector = self.metrics_collector
        hit = []
        for block in blocks:
            if block.ref_cnt == 0 and not block.is_null:
                self.free_block_queue.remove(block)
                hit.append(block)
            block.ref_cnt += 1
            if collector:
                collector.on_block_accessed(block)
        self.num_used_blocks += len(hit)
        self.free_lists.remove_cached(hit)

    def reset_prefix_cache(self) -> bool:
        """Forget all cached blocks and free them; return False if requests still hold blocks."""
        num_blocks = self.num_gpu_blocks
        # vLLM calls used whatever is not free; blocks of pages that are not resident are neither.
        self.num_gpu_blocks = 1 + self.num_used_blocks + self.get_num_free_blocks()
        try:
            done: bool = super().reset_prefix_cache()
        finally:
            self.num_gpu_blocks = num_blocks
        if done:
            self._free_cached(self.free_block_queue.get_all_free_blocks())
        return done

    def promise_blocks(self, num_blocks: int) -> None:
        """Have `num_blocks` blocks that can be had, or as many as there may be: a request waits."""
        missing = num_blocks - self.num_idle_blocks
        if missing > self.pages.num_ready_blocks:
            self.pages.promise_blocks(missing, is_urgent=True)

    def evict_pages(self, num_pages: int) -> bool:
        """Empty up to `num_pages` cached pages; return whether there was one.

        The page whose youngest block is oldest goes first, and pages of which a tier has copies go
        before others. Those that a copy holds cannot be closed yet, so they come last, and only as
        many as are wanted beside the empty ones that are held already.
        """
        holds, held = self.pages.book.holds, set[int]()
        if holds:
            held = holds.held_of(self.free_lists.pages_in(CACHED))
        num_evicted = self._evict(num_pages, held)
        if held and num_evicted < num_pages:
            num_more = num_pages - num_evicted - self.pages.num_held_empty()
            num_evicted += self._evict(max(num_more, 0))
        return num_evicted > 0

    def _evict(self, num_pages: int, left_out: Collection[int] = ()) -> int:
        num_evicted = 0
        pages = self.free_lists.cached_pages(self._queued_blocks(), self.is_copied, left_out)
        for blocks in islice(pages, num_pages):
            num_evicted += 1
            self._free_cached(blocks)
        self.num_evicted_pages += num_evicted
        return num_evicted

    def _take(self, num_blocks: int) -> list[KVCacheBlock]:
        free_lists, queue = self.free_lists, self.free_block_queue
        missing = num_blocks - free_lists.num_free
        if missing > 0:
            self.pages.promise_blocks(missing)
            if num_blocks > self.get_num_free_blocks():
                raise ValueError(f"Cannot get {num_blocks} free blocks from the pool")
            self.pages.open_blocks(missing)
        blocks = free_lists.take(num_blocks)
        if len(blocks) < num_blocks:
            evicted = queue.popleft_n(num_blocks - len(blocks))
            free_lists.remove_cached(evicted)
            for block in evicted:
                self._maybe_evict_cached_block(block)
            blocks.extend(evicted)
        return blocks

    def _free_cached(self, blocks: Sequence[KVCacheBlock]) -> None:
        for block in blocks:
            self.free_block_queue.remove(block)
            self._maybe_evict_cached_block(block)
        self.free_lists.remove_cached(blocks)
        self.free_lists.give(blocks)

    def _queued_blocks(self) -> Iterator[KVCacheBlock]:
        """Yield what may be evicted, the oldest first; what was yielded may leave the queue."""
        block: Any = self.free_block_queue.fake_free_list_head.next_free_block
        while (following := block.next_free_block) is not None:  # the tail, no block, has none
            yield block
            block = following
