"""One SGLang scheduler: where its memory lies, and what it promises, holds back and gives."""

import logging
from math import ceil
from typing import TYPE_CHECKING, Any

from kvcached_core.config import CUDA, Config, read_config
from kvcached_core.engine.counted_blocks import CountedBlocks
from kvcached_core.engine.engine import ElasticEngine
from kvcached_core.engine.instance import Instance
from kvcached_core.engine.joining import Group, join_ranks
from kvcached_core.engine.page_book import PageBook
from kvcached_core.engine.pages import NUM_QUIET_PAGES, Pages
from kvcached_core.engine.placing import Placing, Planes, virtual_bytes
from kvcached_core.engine.ranks import NUM_IDLE_TURNS
from kvcached_core.engine.start import model_name
from kvcached_core.memory.arena import Arena
from kvcached_core.memory.geometry import Geometry
from kvcached_core.memory.layer_tensors import PoolShape
from kvcached_core.memory.rank import RankMemory
from kvcached_core.memory.torch_device import current_stream, find_device, make_backend
from kvcached_sglang.demand import Demand, demand_of, named_blocks, tokens_to_go_on
from kvcached_sglang.obstacles import has_two_pools
from kvcached_sglang.port import SglangPort
from kvcached_sglang.requests import give_up_part, is_asleep, reopen
from kvcached_sglang.saved_memory import SavedMemory, reserved_bytes
from kvcached_sglang.startup import startup

if TYPE_CHECKING:
    from kvcached_sglang.free_list import FreeList

logger = logging.getLogger("sglang.kvcached")

# How long a prompt of which a part is computed waits while nothing else runs; then it gives that
# part back, or two engines that hold a part each would wait for each other.
HOLD_SECONDS = 2.0

# SGLang's loop never sleeps. In a turn that runs nothing it leaves the interpreter's lock for so
# long to the threads that map and unmap: they would have to wait for it twice a page.
STEP_ASIDE_SECONDS = 0.002


class SglangEngine(ElasticEngine):
    """The memory of one scheduler process, from its first size to its end.

    Args:
        device: Where the KV cache lies, as torch names it.
        server_args: SGLang's settings.
        context_tokens: The longest request.
        config: Ours.
        group: The ranks that share the model.
        num_pools: 1, or 2 where layers with a sliding window have a pool of their own.
    """

    port: SglangPort
    can_counts_wait = True  # its loop comes again soon

    def __init__(
        self,
        device: Any,
        server_args: Any,
        context_tokens: int,
        config: Config,
        group: Group = Group(),  # noqa: B008  it is frozen
        num_pools: int = 1,
    ) -> None:
        self.config = config
        self.server_args = server_args
        self.device = find_device(device, config)
        does_loop_sleep = getattr(server_args, "sleep_on_idle", False)  # a second in an idle turn
        ranks = join_ranks(
            self.device,
            group,
            lambda devices: Instance(
                devices,
                config,
                name=config.name,
                default_name=model_name(server_args.served_model_name or server_args.model_path),
                engine=startup.engine,
                on_ring=lambda: None,  # the scheduler's loop looks by itself
            ),
            num_idle_turns=1 if does_loop_sleep else NUM_IDLE_TURNS,
        )
        super().__init__(ranks, SglangPort(current_stream(device)))
        self.placing = Placing(
            ranks,
            config,
            self.device,
            logger,
            length_setting="--context-length",
            num_pools=num_pools,
        )
        self.saved = SavedMemory(reserved_bytes if self.device.kind == CUDA else lambda: 0)
        self._shared: PageBook | None = None  # that of two pools
        self._backend = make_backend(device)
        self._context_tokens = context_tokens
        self._held_since: float | None = None
        self._room_pages = 0  # at the last schedule

    @property
    def memory(self) -> RankMemory | None:
        """This rank's, once SGLang has made its first pool."""
        return self.port.memory

    @property
    def free_lists(self) -> "list[FreeList]":
        """The free lists of all pools, that of the pool of all layers first."""
        return self.port.free_lists

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
        port, num_pages = self.port, self.placing.num_pages
        if port.memory is None:
            port.memory = RankMemory(
                geometry, num_pages, self.ranks.seat, self._backend, port.stream
            )
            logger.info("kvcached: %s", port.memory.addresses)
            if self.placing.num_pools > 1:
                self._shared = PageBook(num_pages, self.ranks.clock)
        return geometry, port.memory.arena

    def adopt(self, allocator: Any, geometry: Geometry) -> None:
        """Give an allocator the blocks of our pages."""
        from kvcached_sglang.allocators import make_elastic

        number = len(self.pools)

        def make_pages(blocks: CountedBlocks) -> Pages:
            return Pages(
                geometry,
                self.placing.num_pages,
                self.ranks,
                blocks,
                num_quiet_pages=0 if number else NUM_QUIET_PAGES,
                shared=self._shared,
                clock=self.ranks.clock,
                **self.placing.page_options,
            )

        free_list = make_elastic(allocator, make_pages, self, number)
        self.free_lists.append(free_list)
        self.pools.append(free_list.pages)

    def before_schedule(self, scheduler: Any) -> None:
        """Give what others want, and take a promise of what this schedule may need at most."""
        if not self.pools:
            return
        self.port.scheduler = scheduler
        self.port.carry_out_later()
        room_pages, is_busy = self._room_pages, self.port.is_busy()
        wanted = self.ranks.look(is_busy=is_busy)
        self._room_pages = self.ranks.room_pages
        reopen(scheduler, has_more=self._room_pages > room_pages)
        if wanted is not None:
            self.giving.give(wanted)
        self.pay()
        if self._held_since is not None and self.ranks.clock() > self._held_since + HOLD_SECONDS:
            self._held_since = None
            give_up_part(scheduler)
        if (is_busy or scheduler.last_batch is not None) and not is_asleep(scheduler):
            tokens = self.free_lists[0].block_tokens
            self.promise_demand(demand_of(scheduler, tokens, self.server_args.max_prefill_tokens))

    def promise_demand(self, demand: Demand) -> None:
        """Take a promise of what the next batch takes at most, or of what there is of it.

        Where no waiting request can be let in anyhow, nothing is promised for one: it would go back
        after the schedule, and a neighbour that asked meanwhile would have stopped a request. Then
        others are only asked, and nothing is counted on but what is free.
        """
        num_wanted = demand.num_running + demand.num_queued
        if not demand.num_least or self._fits(demand):
            self._promise_all(num_wanted)
            return
        self._promise_all(demand.num_running)
        num_lacking = 0
        for free_list in self.free_lists:
            num_lacking += free_list.pages.num_lacking(num_wanted - free_list.num_free_blocks)
            free_list.is_bound = True  # one with a cached prefix needs less, and may come in
        self.ranks.ask(num_lacking - self.ranks.room_pages)

    def pay(self) -> None:
        """Give more of what is owed, at once: this schedule would take it."""
        self.giving.pay()
        if self.pools[0].book.orders:
            self._tell(wait=False)

    def must_hold(self, scheduler: Any) -> bool:
        """Return whether no prompt may be computed now.

        One that was begun waits if its next part has no room, and a new one if a neighbour waits
        for what was asked of this engine and comes free next.
        """
        if not self.pools:
            return False
        is_running = bool(scheduler.running_batch.reqs)
        if scheduler.chunked_req is None:
            return self.giving.must_yield(is_running=is_running)
        needed = tokens_to_go_on(scheduler, self.free_lists[0].block_tokens)
        available = min(
            free_list.num_available_blocks() * free_list.block_tokens
            + self.port.evictable_tokens(number)
            for number, free_list in enumerate(self.free_lists)
        )
        if available >= needed:
            self._held_since = None
            return False
        if self._held_since is None or is_running or scheduler.last_batch is not None:
            self._held_since = self.ranks.clock()  # what runs will end, and free something
        return True

    def after_schedule(self, scheduler: Any, *, has_batch: bool) -> None:
        """Give back what was promised and not used, and map what the batch needs."""
        if not self.pools:
            return
        for free_list in self.free_lists:
            free_list.is_bound = False
        self.port.has_batch = has_batch
        orders = self.end_schedule()
        if orders is not None:
            self.port.begin_step(orders)
        if has_batch:
            return
        self.port.carry_out_later()
        if self.ranks.is_waiting and self.port.num_waiting():
            self.port.publish_gauges()
        if scheduler.last_batch is None and self.memory is not None:
            self.memory.keeper.wait(STEP_ASIDE_SECONDS)

    def begin_batch(self) -> None:
        """Map what was opened since the schedule ended: no loop that we serve opens anything."""
        if self.pools and self.pools[0].book.orders:
            self.port.begin_step(self._take_orders(is_live=True))

    def check(self, scheduler: Any, batch: Any) -> None:
        """Refuse a batch that names a block which is not mapped: see `RankMemory.check_blocks`."""
        named = named_blocks(scheduler, batch, self.free_lists[0].block_tokens).tolist()
        self.memory.check_blocks(named, self.pools[0].geometry)  # type: ignore[union-attr]

    def _promise_all(self, num_blocks: int) -> None:
        missing = [num_blocks - free_list.num_free_blocks for free_list in self.free_lists]
        if max(missing) <= 0:
            return
        self.promise(missing)
        for free_list, number in zip(self.free_lists, missing, strict=True):
            # What is not promised cannot be counted on: an allocation that fails ends SGLang.
            free_list.is_bound = free_list.pages.num_ready_blocks < number

    def _fits(self, demand: Demand) -> bool:
        """Return whether one waiting request can be let in, by the pool of all layers.

        What leaves a window comes back, so of the other pool a request never needs all its tokens.
        """
        free_list = self.free_lists[0]
        needed = (demand.num_running + demand.num_least) * free_list.block_tokens
        return (
            needed
            <= free_list.num_available_blocks() * free_list.block_tokens
            + self.port.evictable_tokens(0)
        )


_engine: SglangEngine | None = None


def start_engine(runner: Any) -> SglangEngine:
    """Return this process's engine, made at the first call.

    Args:
        runner: SGLang's model runner, or what plans the KV cache for it.
    """
    global _engine  # noqa: PLW0603  one scheduler, one engine in a process
    if _engine is None:
        import torch
        from sglang.srt.distributed.parallel_state import get_tp_group

        group = get_tp_group()
        _engine = SglangEngine(
            torch.device(runner.device),
            runner.server_args,
            runner.model_config.context_len,
            read_config(),
            Group(group.rank_in_group, group.ranks, group.cpu_group),
            num_pools=2 if has_two_pools(runner) else 1,
        )
    return _engine


def engine() -> SglangEngine | None:
    """Return this process's engine, or None where SGLang is served as it is."""
    return _engine
