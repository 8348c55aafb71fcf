"""One SGLang scheduler in the ledger: its instance, its memory, and what it gives and takes."""

import atexit
import logging
from math import ceil
from typing import TYPE_CHECKING, Any

from kvcached_core.config import CUDA, HOST, Config, read_config
from kvcached_core.engine.page_book import PageBook
from kvcached_core.engine.pages import NUM_QUIET_PAGES, Pages
from kvcached_core.engine.placing import Placing, Planes, virtual_bytes
from kvcached_core.engine.port import Blocks
from kvcached_core.engine.start import model_name
from kvcached_core.errors import UnmappedBlockError
from kvcached_core.memory.arena import Arena
from kvcached_core.memory.geometry import Geometry
from kvcached_core.memory.rank import RankMemory
from kvcached_sglang import hardware
from kvcached_sglang.demand import demand_of, named_blocks, tokens_to_go_on
from kvcached_sglang.giving import Giving
from kvcached_sglang.obstacles import has_two_pools
from kvcached_sglang.pools import PoolShape
from kvcached_sglang.promises import Promises
from kvcached_sglang.ranks import join_ranks
from kvcached_sglang.requests import (
    evictable_of_pools,
    evictable_tokens,
    give_up_part,
    is_asleep,
    is_busy,
    reopen,
)
from kvcached_sglang.saved_memory import SavedMemory
from kvcached_sglang.startup import startup
from kvcached_sglang.waiting import Waiting

if TYPE_CHECKING:
    from kvcached_core.memory.orders import PageOrders
    from kvcached_sglang.free_list import FreeList

logger = logging.getLogger("sglang.kvcached")

# How long a prompt of which a part is computed waits while nothing else runs; then it gives that
# part back, or two engines that hold a part each would wait for each other.
HOLD_SECONDS = 2.0

# SGLang's loop never sleeps. In a turn that runs nothing it leaves the interpreter's lock for so
# long to the threads that map and unmap: they would have to wait for it twice a page.
STEP_ASIDE_SECONDS = 0.002


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
            name=model_name(server_args.served_model_name or server_args.model_path),
            engine=startup.engine,
            does_loop_sleep=getattr(server_args, "sleep_on_idle", False),
        )
        self.placing = Placing(
            self.ranks,
            config,
            self.device,
            logger,
            length_setting="--context-length",
            num_pools=num_pools,
        )
        self.memory: RankMemory | None = None  # made with SGLang's first pool
        self._shared: PageBook | None = None  # that of two pools
        self._backend = hardware.make_backend(device)
        self._context_tokens = context_tokens
        self.saved = SavedMemory(hardware.reserved_bytes if self.device.kind == CUDA else lambda: 0)
        self.free_lists: list[FreeList] = []  # that of the pool of all layers first
        self.waiting = Waiting(self.ranks)
        self.promises = Promises(self.ranks, self.free_lists)
        self.giving = Giving(self.ranks, self.free_lists, self.tell)
        self._later: PageOrders | None = None  # of which a part waits for the launches
        self._tree_cache: Any = None
        self._held_since: float | None = None
        self._room_pages = 0  # at the last schedule
        self._forward_stream: Any = None
        atexit.register(self.close)

    @property
    def virtual_bytes(self) -> int:
        """What SGLang is told that it has for its KV cache, in bytes."""
        return virtual_bytes(self.config, self.ranks.capacity_bytes, self.ranks.seat.num_ranks)

    def place(self, shape: PoolShape) -> tuple[Geometry, Arena]:
        """Choose a pool's geometry; with the first one make the arena, with page 0 mapped.

        SGLang refuses a request that is longer than its pool, so none needs more.

        Raises:
            KVCachedError: As `Placing.place`.
        """
        longest_blocks = ceil(self._context_tokens / shape.block_tokens)
        geometry = self.placing.place(
            Planes(
                shape.block_bytes,
                shape.num_planes,
                shape.num_blocks,
                min(longest_blocks, shape.num_blocks - 1),
                is_exact=True,
            ),
            self._backend.granularity_bytes,
            self.ranks.seat.num_ranks,
        )
        num_pages = self.placing.num_pages
        if self.memory is None:
            self.memory = RankMemory(
                geometry, num_pages, self.ranks.seat, self._backend, self._stream
            )
            logger.info("kvcached: %s", self.memory.addresses)
            if self.placing.num_pools > 1:
                self._shared = PageBook(num_pages, self.ranks.clock)
        return geometry, self.memory.arena

    def adopt(self, allocator: Any, geometry: Geometry) -> None:
        """Give an allocator the blocks of our pages."""
        from kvcached_sglang.allocators import make_elastic

        low, high = self.config.spare_pages(self.device.kind)
        number = len(self.free_lists)

        def make_pages(blocks: Blocks) -> Pages:
            return Pages(
                geometry,
                self.placing.num_pages,
                self.ranks,
                blocks,
                min_spare_pages=low,
                max_spare_pages=high,
                idle_seconds=self.config.idle_seconds,
                num_quiet_pages=0 if number else NUM_QUIET_PAGES,
                shared=self._shared,
                clock=self.ranks.clock,
            )

        def count_cached() -> int:
            if self._tree_cache is None:
                return 0
            return evictable_of_pools(self._tree_cache, self.placing.num_pools)[number]

        room = lambda: self.ranks.room_pages  # noqa: E731
        self.free_lists.append(make_elastic(allocator, make_pages, room, count_cached))

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
        self._tree_cache = scheduler.tree_cache
        self._carry_out_later()
        room_pages = self._room_pages
        wanted = self.ranks.look(is_busy=is_busy(scheduler))
        self._room_pages = self.ranks.room_pages
        reopen(scheduler, has_more=self._room_pages > room_pages)
        if wanted is not None:
            self.giving.answer(wanted, scheduler.tree_cache)
        self.giving.pay(scheduler.tree_cache)
        if self._held_since is not None and self.ranks.clock() > self._held_since + HOLD_SECONDS:
            self._held_since = None
            give_up_part(scheduler)
        if not is_asleep(scheduler):
            tokens = self.free_lists[0].block_tokens
            self.promises.take(
                demand_of(scheduler, tokens, self.server_args.max_prefill_tokens),
                evictable_tokens(scheduler.tree_cache),
            )

    def must_hold(self, scheduler: Any) -> bool:
        """Return whether no prompt may be computed now.

        One that was begun waits if its next part has no room, and a new one if a neighbour waits
        for what was asked of this engine and comes free next.
        """
        if not self.free_lists:
            return False
        if scheduler.chunked_req is None:
            return self.giving.must_yield(scheduler)
        needed = tokens_to_go_on(scheduler, self.free_lists[0].block_tokens)
        is_running = bool(scheduler.running_batch.reqs) or scheduler.last_batch is not None
        evictable = evictable_of_pools(scheduler.tree_cache, self.placing.num_pools)
        available = min(
            free_list.available_tokens() + num_tokens
            for free_list, num_tokens in zip(self.free_lists, evictable, strict=True)
        )
        if available >= needed:
            self._held_since = None
            return False
        if self._held_since is None or is_running:
            self._held_since = self.ranks.clock()  # what runs will end, and free something
        return True

    def end_schedule(self, scheduler: Any, *, has_batch: bool) -> None:
        """Give back what was promised and not used, and see to empty pages."""
        if not self.free_lists:
            return
        is_live = has_batch or bool(scheduler.running_batch.reqs)
        for free_list in self.free_lists:
            free_list.is_bound = False
            free_list.pages.end_schedule(is_live=is_live)
        self._tell(is_live=is_live)
        if not has_batch:
            self._carry_out_later()
        self.waiting.end_schedule(scheduler, has_batch=has_batch)
        if not has_batch and scheduler.last_batch is None:
            self.memory.keeper.wait(STEP_ASIDE_SECONDS)  # type: ignore[union-attr]

    def tell(self) -> None:
        """Have done what was decided, between two steps."""
        self._tell(is_live=False)
        self._carry_out_later()

    def check(self, scheduler: Any, batch: Any) -> None:
        """Refuse a batch that names a block which is not mapped.

        Raises:
            UnmappedBlockError: With the block ids and their pages.
        """
        free_list, memory = self.free_lists[0], self.memory
        geometry = free_list.pages.geometry
        named = named_blocks(scheduler, batch, free_list.block_tokens).tolist()
        wrong = [
            block_id
            for block_id in named
            if not geometry.exists(block_id)
            or not memory.arena.is_resident(geometry.page_of(block_id))  # type: ignore[union-attr]
        ]
        if wrong:
            pages = sorted({geometry.page_of(block_id) for block_id in wrong})
            raise UnmappedBlockError(
                f"a batch uses unmapped blocks {wrong[:8]} of pages {pages[:8]}"
            )

    def empty(self) -> None:
        """Give everything back but page 0; return when it is done."""
        if self.memory is not None:
            self.ranks.clear_waiting()
            self.giving.close_empty(self.placing.num_pages)
            self.tell()
            self.memory.keeper.wait()

    def close(self) -> None:
        """Leave the ledger."""
        atexit.unregister(self.close)
        self.ranks.close()

    def _tell(self, *, is_live: bool) -> None:
        """Have mapped what the next step needs; the rest can wait until it is launched.

        Mapping and unmapping beside a batch's launches would hold them up.
        """
        self._carry_out_later()
        book = self.free_lists[0].pages.book
        self._later = book.take_orders(self._count_pages, is_live=is_live)
        if self._later is not None:
            self.memory.before_step(self._later)  # type: ignore[union-attr]

    def _carry_out_later(self) -> None:
        orders, self._later = self._later, None
        if orders is not None:
            self.memory.after_step(orders)  # type: ignore[union-attr]

    def _count_pages(self) -> tuple[int, int]:
        counts = [free_list.count_pages() for free_list in self.free_lists]
        page_0 = int(self.placing.num_pools > 1)
        return page_0 + sum(used for used, _ in counts), sum(cached for _, cached in counts)

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
