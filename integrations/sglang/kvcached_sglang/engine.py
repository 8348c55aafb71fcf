"""One SGLang scheduler in the ledger: its instance, its memory, and what it gives and takes."""

import atexit
import logging
import time
from typing import TYPE_CHECKING, Any

from kvcached_core.config import CUDA, HOST, Config, read_config
from kvcached_core.geometry import Geometry
from kvcached_core.orders import PageOrders
from kvcached_core.page_pool import NUM_QUIET_PAGES, REPORT_SECONDS
from kvcached_core.rank_memory import RankMemory
from kvcached_sglang import hardware, startup
from kvcached_sglang.blocks import BlockPages
from kvcached_sglang.layout import Layout
from kvcached_sglang.obstacles import has_two_pools
from kvcached_sglang.ranks import Wanted, join_ranks
from kvcached_sglang.requests import (
    evictable_of_pools,
    evictable_tokens,
    give_up_part,
    is_asleep,
    is_busy,
    num_computed,
    reopen,
)
from kvcached_sglang.saved_memory import SavedMemory

if TYPE_CHECKING:
    from kvcached_sglang.free_list import FreeList

logger = logging.getLogger("sglang.kvcached")

# How long a prompt of which a part is computed waits while nothing else runs; then it gives that
# part back, or two engines that hold a part each would wait for each other.
HOLD_SECONDS = 2.0

# How much of a request's answer an admission counts on, as SGLang's own policy does.
MAX_ANSWER_TOKENS = 4096


class ElasticEngine:
    """The memory of one scheduler process, from its first size to its end.

    Args:
        device: Where the KV cache lies.
        server_args: SGLang's settings.
        context_tokens: The longest request.
        config: Ours.
        group: SGLang's group of the ranks that share the model.
        num_pools: 1, or 2 where layers with a sliding window have a pool of their own.
    """

    def __init__(
        self,
        device: Any,
        server_args: Any,
        context_tokens: int,
        config: Config,
        group: Any,
        num_pools: int = 1,
    ) -> None:
        self.config = config
        self.server_args = server_args
        self.device = hardware.find_device(device, config)
        self.ranks = join_ranks(
            self.device,
            config,
            group,
            name=startup.model_name(server_args),
            engine=f"sglang {startup.installed().release}",
        )
        self.layout = Layout(
            self.ranks,
            hardware.make_backend(device),
            self.device,
            config,
            context_tokens,
            num_pools,
            self._stream,
        )
        self.saved = SavedMemory(hardware.reserved_bytes if self.device.kind == CUDA else lambda: 0)
        self.free_lists: list[FreeList] = []  # that of the pool of all layers first
        self._owed_pages = 0
        self._reported = (0, 0)
        self._reported_at = 0.0
        self._held_since: float | None = None
        self._is_ahead_due = False
        self._forward_stream: Any = None
        atexit.register(self.close)

    @property
    def memory(self) -> RankMemory | None:
        """This rank's memory, once SGLang made its first pool."""
        return self.layout.memory

    def adopt(self, allocator: Any, geometry: Geometry) -> None:
        """Give an allocator the blocks of our pages."""
        from kvcached_sglang.allocators import make_elastic

        low, high = self.config.spare_pages(self.device.kind)
        pages = BlockPages(
            geometry,
            self.layout.num_pages,
            self.ranks,
            self._carry_out,
            allocator.device,
            min_spare_pages=low,
            max_spare_pages=high,
            idle_seconds=self.config.idle_seconds,
            num_quiet_pages=0 if self.free_lists else NUM_QUIET_PAGES,
            unmapped=self.layout.unmapped,
            clock=self.ranks.clock,
        )
        per_page = geometry.blocks_per_page
        free_list = make_elastic(allocator, pages, lambda: self.ranks.room_pages * per_page)
        self.free_lists.append(free_list)

    def make_room_for(self, static_bytes: int) -> None:
        """Let neighbours make room for what a start allocates first: the weights, above all.

        Where there is not enough, the start goes on, and what it needs is promised to nobody else.
        """
        shortage = self.ranks.make_room(static_bytes)
        if shortage is not None:
            logger.warning("kvcached: %s; the start of this engine goes on", shortage)
            self.ranks.announce(static_bytes)

    def begin_schedule(self, scheduler: Any) -> None:
        """Give what others want, and take a promise of what this schedule may need at most."""
        if not self.free_lists:
            return
        # A batch runs on this stream beside the next schedule, and reads what was freed for it.
        self._forward_stream = getattr(scheduler, "forward_stream", None)
        # Only now: mapping beside a batch's launches would hold them up.
        is_ahead_due, self._is_ahead_due = self._is_ahead_due, False
        if is_ahead_due and is_busy(scheduler):
            for free_list in self.free_lists:
                free_list.pages.map_ahead(free_list.num_free_blocks)
        reopen(scheduler)
        wanted = self.ranks.look()
        if wanted is not None:
            self.answer(wanted, scheduler.tree_cache)
        self.pay(scheduler.tree_cache)
        if self._held_since is not None and self.ranks.clock() > self._held_since + HOLD_SECONDS:
            self._held_since = None
            give_up_part(scheduler)
        if not is_asleep(scheduler):
            self._reserve(self._blocks_needed(scheduler))

    def must_hold(self, scheduler: Any) -> bool:
        """Return whether a prompt that was begun has to wait, because its next part has no room."""
        request = scheduler.chunked_req
        if not self.free_lists or request is None:
            return False
        missing = len(request.origin_input_ids) + len(request.output_ids) - num_computed(request)
        chunk = min(missing, scheduler.chunked_prefill_size or missing)
        num_running = len(scheduler.running_batch.reqs)
        needed = chunk + (num_running + 1) * self.free_lists[0].block_tokens
        evictable = evictable_of_pools(scheduler.tree_cache, self.layout.num_pools)
        available = min(
            free_list.available_tokens() + num_tokens
            for free_list, num_tokens in zip(self.free_lists, evictable, strict=True)
        )
        if available >= needed:
            self._held_since = None
            return False
        if self._held_since is None or num_running or scheduler.last_batch is not None:
            self._held_since = self.ranks.clock()  # what runs will end, and free something
        return True

    def end_schedule(self, scheduler: Any, *, has_batch: bool) -> None:
        """Give back what was promised and not used, and see to empty pages."""
        self._is_ahead_due = has_batch
        is_live = has_batch or bool(scheduler.running_batch.reqs)
        for free_list in self.free_lists:
            free_list.is_bound = False
            pages = free_list.pages
            pages.cancel()
            if pages.is_surplus_due(free_list.num_free_blocks, is_live=is_live):
                keep = pages.max_spare_pages if is_live else pages.num_quiet_pages
                self._unmap(free_list.release(self.layout.num_pages, keep=keep))
        self._report(scheduler.tree_cache)

    def answer(self, wanted: Wanted, tree_cache: Any) -> None:
        """Give what others or the limit want: empty pages, then cached blocks, then requests'."""
        num_given = self._give(tree_cache, wanted.asked_pages)
        self._owe(max(min(wanted.asked_pages - num_given, wanted.owed_pages), 0))

    def pay(self, tree_cache: Any) -> None:
        """Give more of what is owed: requests may have stopped for it."""
        if self._owed_pages:
            self._owe(self._owed_pages - self._give(tree_cache, self._owed_pages))

    def empty(self) -> None:
        """Give everything back but page 0; return when it is done."""
        if self.memory is not None:
            self._unmap(self._release(self.layout.num_pages))
            self.memory.keeper.wait()

    def close(self) -> None:
        """Leave the ledger."""
        atexit.unregister(self.close)
        self.ranks.close()

    def _reserve(self, num_blocks: int) -> None:
        """Take a promise of so many blocks of each pool, or of what there is for both alike."""
        missing = [num_blocks - free_list.num_free_blocks for free_list in self.free_lists]
        if len(missing) > 1:
            self._split_room(missing)
        for free_list, number in zip(self.free_lists, missing, strict=True):
            if number > 0:
                free_list.pages.reserve_blocks(number)
                # What is not promised cannot be counted on: an allocation that fails ends SGLang.
                free_list.is_bound = free_list.pages.num_ready_blocks < number

    def _split_room(self, missing: list[int]) -> None:
        """Where there are fewer pages than both pools want, promise each its share first."""
        pages = [free_list.pages for free_list in self.free_lists]
        wanted = [one.pages_for(number) for one, number in zip(pages, missing, strict=True)]
        room = self.ranks.room_pages
        if sum(wanted) > room:
            for one, number in zip(pages, wanted, strict=True):
                one.reserve_pages(room * number // sum(wanted))

    def _owe(self, num_pages: int) -> None:
        self._owed_pages = num_pages
        for free_list in self.free_lists:
            free_list.is_owing = num_pages > 0

    def _release(self, num_pages: int) -> list[int]:
        closed: list[int] = []
        for free_list in self.free_lists:
            if len(closed) < num_pages:
                closed += free_list.release(num_pages - len(closed))
        return closed

    def _give(self, tree_cache: Any, num_pages: int) -> int:
        closed = self._release(num_pages)
        while len(closed) < num_pages and self._evict(tree_cache, num_pages - len(closed)):
            closed += self._release(num_pages - len(closed))
        self.ranks.answer(len(closed))
        self._unmap(closed)
        return len(closed)

    def _evict(self, tree_cache: Any, num_pages: int) -> bool:
        from sglang.srt.mem_cache.base_prefix_cache import EvictParams

        before = [free_list.num_free_blocks for free_list in self.free_lists]
        if not evictable_tokens(tree_cache):
            return False
        free_list = self.free_lists[0]
        num_blocks = num_pages * free_list.pages.geometry.blocks_per_page
        tree_cache.evict(EvictParams(num_tokens=num_blocks * free_list.block_tokens))
        return before != [free_list.num_free_blocks for free_list in self.free_lists]

    def _blocks_needed(self, scheduler: Any) -> int:
        """Return the blocks that the next batch takes at most, of each pool."""
        block_tokens = self.free_lists[0].block_tokens
        budget = self.server_args.max_prefill_tokens
        batches = (scheduler.running_batch, scheduler.last_batch)
        num_blocks = sum(len(batch.reqs) for batch in batches if batch is not None)
        chunked = [scheduler.chunked_req] if scheduler.chunked_req is not None else []
        for request in (*chunked, *scheduler.waiting_queue):
            if budget <= 0:
                break
            length = len(request.origin_input_ids) + len(request.output_ids)
            answer = min(request.sampling_params.max_new_tokens or 0, MAX_ANSWER_TOKENS)
            num_blocks += -(-(length + answer) // block_tokens) + 1
            budget -= length
        return int(num_blocks)

    def _carry_out(self, orders: PageOrders) -> None:
        orders.num_used_pages, orders.num_cached_pages = self._reported
        self.memory.apply(orders)  # type: ignore[union-attr]

    def _unmap(self, pages: list[int]) -> None:
        if pages:
            self.memory.after_step(PageOrders(unmap_pages=pages))  # type: ignore[union-attr]

    def _report(self, tree_cache: Any) -> None:
        now = time.monotonic()
        if not self.free_lists or now < self._reported_at + REPORT_SECONDS:
            return
        self._reported_at = now
        evictable = evictable_of_pools(tree_cache, self.layout.num_pools)
        counts = [
            free_list.count_pages(num_tokens)
            for free_list, num_tokens in zip(self.free_lists, evictable, strict=True)
        ]
        page_0 = int(self.layout.num_pools > 1)
        reported = page_0 + sum(used for used, _ in counts), sum(cached for _, cached in counts)
        if reported != self._reported:
            self._reported = reported
            self._carry_out(PageOrders())

    def _stream(self) -> int:
        if self.device.kind == HOST:
            return 0
        if self._forward_stream is not None:
            return int(self._forward_stream.cuda_stream)
        return hardware.current_stream()


_engine: ElasticEngine | None = None


def start_engine(runner: Any) -> ElasticEngine:
    """Return this process's engine, made at the first call.

    Args:
        runner: SGLang's model runner, or what plans the KV cache for it.
    """
    global _engine  # noqa: PLW0603  one scheduler, one engine in a process
    if _engine is None:
        from sglang.srt.distributed.parallel_state import get_tp_group

        _engine = ElasticEngine(
            runner.device,
            runner.server_args,
            runner.model_config.context_len,
            read_config(),
            get_tp_group(),
            num_pools=2 if has_two_pools(runner) else 1,
        )
    return _engine


def engine() -> ElasticEngine | None:
    """Return this process's engine, or None where SGLang is served as it is."""
    return _engine
