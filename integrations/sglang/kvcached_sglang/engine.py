"""One SGLang scheduler in the ledger: its instance, its memory, and what it gives and takes."""

import atexit
import logging
import time
from math import ceil
from typing import Any

from kvcached_core.config import HOST, Config, read_config
from kvcached_core.errors import ConfigError
from kvcached_core.geometry import Geometry, choose_geometry
from kvcached_core.page_pool import NUM_QUIET_PAGES, REPORT_SECONDS, PageOrders
from kvcached_core.rank_memory import RankMemory
from kvcached_core.units import format_bytes
from kvcached_sglang import hardware, startup
from kvcached_sglang.blocks import BlockPages
from kvcached_sglang.free_list import FreeList
from kvcached_sglang.pools import PoolShape
from kvcached_sglang.ranks import Wanted, join_ranks
from kvcached_sglang.requests import evictable_tokens, give_up_part, is_busy, num_computed, reopen

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
    """

    def __init__(
        self, device: Any, server_args: Any, context_tokens: int, config: Config, group: Any
    ) -> None:
        self.config = config
        self.context_tokens = context_tokens
        self.server_args = server_args
        self.device = hardware.find_device(device, config)
        self.ranks = join_ranks(
            self.device,
            config,
            group,
            name=startup.model_name(server_args),
            engine=f"sglang {startup.installed().release}",
        )
        self.backend = hardware.make_backend(device)
        self.memory: RankMemory | None = None
        self.free_list: FreeList | None = None
        self.geometry: Geometry | None = None
        self._reported = (0, 0)
        self._reported_at = 0.0
        self._held_since: float | None = None
        self._is_ahead_due = False
        self._forward_stream: Any = None
        atexit.register(self.close)

    @property
    def virtual_bytes(self) -> int:
        """What SGLang is told that it has for its KV cache, in bytes."""
        return self.config.virtual_bytes(self.ranks.capacity_bytes)

    def place(self, shape: PoolShape) -> RankMemory:
        """Choose the geometry and make the arena, with page 0 mapped.

        Raises:
            ConfigError: If there is no room for the first page.
        """
        geometry = choose_geometry(
            block_bytes=shape.block_bytes,
            num_planes=shape.num_planes,
            granularity_bytes=self.backend.granularity_bytes,
            target_page_bytes=self.config.page_bytes,
        )
        per_page = geometry.blocks_per_page
        num_pages = -(-shape.num_blocks // per_page)
        geometry.check_ids(num_pages)
        least_blocks = min(ceil(self.context_tokens / shape.block_tokens), shape.num_blocks - 1)
        self.geometry = geometry
        self.ranks.describe(
            page_bytes=geometry.page_bytes,
            num_pages=num_pages,
            least_pages=ceil((least_blocks + 1) / per_page),
        )
        if not self.ranks.reserve_first_page():
            setting = "KVCACHED_HOST_POOL or " if self.device.kind == HOST else ""
            raise ConfigError(
                f"there is no room for this engine's first page of {geometry.page_bytes} bytes; "
                f"stop another engine or raise {setting}KVCACHED_LIMIT"
            )
        self.memory = RankMemory(geometry, num_pages, self.ranks.seat, self.backend, self._stream)
        logger.info("kvcached: %s", self.memory.addresses)
        logger.info(
            "kvcached: %d pages of %s, %d blocks of %d tokens each, of %s that %s has",
            num_pages,
            format_bytes(geometry.page_bytes),
            per_page,
            shape.block_tokens,
            format_bytes(self.ranks.capacity_bytes),
            self.device.name,
        )
        return self.memory

    def adopt(self, allocator: Any) -> None:
        """Give an allocator the blocks of our pages."""
        if self.memory is None or self.geometry is None:
            raise RuntimeError("SGLang built its allocator before its KV pool")
        from kvcached_sglang.allocators import make_elastic

        low, high = self.config.spare_pages(self.device.kind)
        pages = BlockPages(
            self.geometry,
            self.memory.arena.num_pages,
            self.ranks,
            self._carry_out,
            allocator.device,
            min_spare_pages=low,
            max_spare_pages=high,
            idle_seconds=self.config.idle_seconds,
            clock=self.ranks.clock,
        )
        per_page = self.geometry.blocks_per_page
        self.free_list = make_elastic(allocator, pages, lambda: self.ranks.room_pages * per_page)

    def begin_schedule(self, scheduler: Any) -> None:
        """Give what others want, and take a promise of what this schedule may need at most."""
        free_list = self.free_list
        if free_list is None:
            return
        # A batch runs on this stream beside the next schedule, and reads what was freed for it.
        self._forward_stream = getattr(scheduler, "forward_stream", None)
        # Only now: mapping beside a batch's launches would hold them up.
        is_ahead_due, self._is_ahead_due = self._is_ahead_due, False
        if is_ahead_due and is_busy(scheduler):
            free_list.pages.map_ahead(free_list.num_free_blocks)
        reopen(scheduler)
        wanted = self.ranks.look()
        if wanted is not None:
            self.answer(wanted, free_list, scheduler.tree_cache)
        self.pay(scheduler.tree_cache)
        if self._held_since is not None and self.ranks.clock() > self._held_since + HOLD_SECONDS:
            self._held_since = None
            give_up_part(scheduler)
        missing = self._blocks_needed(scheduler, free_list) - free_list.num_free_blocks
        if missing > 0:
            free_list.pages.reserve_blocks(missing)
            # What is not promised cannot be counted on: an allocation that fails ends SGLang.
            free_list.is_bound = free_list.pages.num_ready_blocks < missing

    def must_hold(self, scheduler: Any) -> bool:
        """Return whether a prompt that was begun has to wait, because its next part has no room."""
        free_list, request = self.free_list, scheduler.chunked_req
        if free_list is None or request is None:
            return False
        missing = len(request.origin_input_ids) + len(request.output_ids) - num_computed(request)
        chunk = min(missing, scheduler.chunked_prefill_size or missing)
        num_running = len(scheduler.running_batch.reqs)
        needed = chunk + (num_running + 1) * free_list.block_tokens
        available = free_list.available_tokens() + evictable_tokens(scheduler.tree_cache)
        if available >= needed:
            self._held_since = None
            return False
        if self._held_since is None or num_running or scheduler.last_batch is not None:
            self._held_since = self.ranks.clock()  # what runs will end, and free something
        return True

    def end_schedule(self, scheduler: Any, *, has_batch: bool) -> None:
        """Give back what was promised and not used, and see to empty pages."""
        free_list = self.free_list
        if free_list is None:
            return
        free_list.is_bound = False
        pages = free_list.pages
        pages.cancel()
        self._is_ahead_due = has_batch
        is_live = has_batch or bool(scheduler.running_batch.reqs)
        if pages.is_surplus_due(free_list.num_free_blocks, is_live=is_live):
            keep = pages.max_spare_pages if is_live else NUM_QUIET_PAGES
            self._unmap(free_list.release(pages.num_pages, keep=keep))
        self._report(free_list, scheduler.tree_cache)

    def answer(self, wanted: Wanted, free_list: FreeList, tree_cache: Any) -> None:
        """Give what others or the limit want: empty pages, then cached blocks, then requests'."""
        num_given = self._give(free_list, tree_cache, wanted.asked_pages)
        free_list.owed_pages = max(min(wanted.asked_pages - num_given, wanted.owed_pages), 0)

    def pay(self, tree_cache: Any) -> None:
        """Give more of what is owed: requests may have stopped for it."""
        free_list = self.free_list
        if free_list is not None and free_list.owed_pages:
            free_list.owed_pages -= self._give(free_list, tree_cache, free_list.owed_pages)

    def empty(self) -> None:
        """Give everything back but page 0; return when it is done."""
        if self.free_list is not None and self.memory is not None:
            self._unmap(self.free_list.release(self.free_list.pages.num_pages))
            self.memory.keeper.wait()

    def close(self) -> None:
        """Leave the ledger."""
        atexit.unregister(self.close)
        self.ranks.close()

    def _give(self, free_list: FreeList, tree_cache: Any, num_pages: int) -> int:
        closed = free_list.release(num_pages) if num_pages else []
        while len(closed) < num_pages and self._evict(
            free_list, tree_cache, num_pages - len(closed)
        ):
            closed += free_list.release(num_pages - len(closed))
        self.ranks.answer(len(closed))
        self._unmap(closed)
        return len(closed)

    @staticmethod
    def _evict(free_list: FreeList, tree_cache: Any, num_pages: int) -> bool:
        from sglang.srt.mem_cache.base_prefix_cache import EvictParams

        before = free_list.num_free_blocks
        if not evictable_tokens(tree_cache):
            return False
        num_blocks = num_pages * free_list.pages.geometry.blocks_per_page
        tree_cache.evict(EvictParams(num_tokens=num_blocks * free_list.block_tokens))
        return free_list.num_free_blocks > before

    def _blocks_needed(self, scheduler: Any, free_list: FreeList) -> int:
        """Return the blocks that the next batch takes at most."""
        block_tokens = free_list.block_tokens
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

    def _report(self, free_list: FreeList, tree_cache: Any) -> None:
        now = time.monotonic()
        if now < self._reported_at + REPORT_SECONDS:
            return
        self._reported_at = now
        per_page = free_list.pages.geometry.blocks_per_page
        num_cached = evictable_tokens(tree_cache) // free_list.block_tokens
        num_used = free_list.num_taken_blocks - num_cached + 1
        num_open = free_list.pages.num_open_pages
        used_pages = min(ceil(num_used / per_page), num_open)
        counts = used_pages, min(ceil(num_cached / per_page), num_open - used_pages)
        if counts != self._reported:
            self._reported = counts
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
        )
    return _engine


def engine() -> ElasticEngine | None:
    """Return this process's engine, or None where SGLang is served as it is."""
    return _engine
