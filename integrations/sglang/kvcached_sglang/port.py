"""SGLang as our engine sees it: what it asks of SGLang's scheduler, between two schedules."""

import time
from collections.abc import Callable
from typing import Any

from kvcached_core.engine.demand import Demand
from kvcached_core.engine.looping_port import LoopingPort
from kvcached_core.weights.status import WeightStatus
from kvcached_sglang import demand, requests
from kvcached_sglang.open_copies import OpenCopies
from kvcached_sglang.states import States, drop_states, evictable_states

GAUGE_SECONDS = 1.0


class SglangPort(LoopingPort):
    """The `LoopingPort` of SGLang.

    Attributes:
        scheduler: SGLang's, from its first schedule on.
        copies: Those that are open, where there is a host tier.
        states: Those of layers that have some, where they lie in our pages: the second pool.

    Args:
        prefill_tokens: The most tokens of prompts that a batch computes.
        current_stream: Returns the stream that torch launches on.
    """

    copies: OpenCopies | None = None
    states: States | None = None

    def __init__(self, prefill_tokens: int, current_stream: Callable[[], int]) -> None:
        super().__init__()
        self.scheduler: Any = None
        self._prefill_tokens = prefill_tokens
        self._current_stream = current_stream
        self._shown_at = 0.0

    def stream(self) -> int:
        """See `LoopingPort.stream`: SGLang has one of its own, beside the next schedule.

        There a batch reads what was freed for that schedule.
        """
        stream = getattr(self.scheduler, "forward_stream", None)
        handle = getattr(stream, "cuda_stream", None)  # the host's have none
        return self._current_stream() if handle is None else int(handle)

    def is_busy(self) -> bool:
        """See `EnginePort.is_busy`: weights that somebody is writing to are in use, too."""
        loop = self.scheduler
        if loop is None:
            return False
        return bool(
            self.is_running()
            or loop.waiting_queue
            or loop.chunked_req is not None
            or requests.is_updating(loop)
        )

    def is_running(self) -> bool:
        """See `LoopingPort.is_running`."""
        return any(batch.reqs for batch in self._batches())

    def is_pending(self) -> bool:
        """See `LoopingPort.is_pending`."""
        stages = getattr(self.scheduler, "mbs", ())
        return self.scheduler.last_batch is not None or any(batch is not None for batch in stages)

    def _batches(self) -> list[Any]:
        """Return what runs; with stages several batches do, in turns, and some are on their way."""
        loop = self.scheduler
        turns = [batch for batch in getattr(loop, "mbs", ()) if batch is not None]
        return [loop.running_batch, *getattr(loop, "running_mbs", ()), *turns]

    def num_waiting(self) -> int:
        """See `EnginePort.num_waiting`."""
        return len(self.scheduler.waiting_queue)

    def demand(self) -> Demand | None:
        """See `LoopingPort.demand`."""
        if requests.is_asleep(self.scheduler):
            return None
        return demand.demand_of(self.scheduler, self.block_tokens, self._prefill_tokens)

    def demand_of(self, number: int, demand: Demand) -> Demand:
        """See `LoopingPort.demand_of`."""
        if number and self.states is not None:
            loop = self.scheduler
            num_rows = max(loop.max_running_requests - len(loop.running_batch.reqs), 0)
            return self.states.demand(min(demand.num_requests, num_rows))
        return super().demand_of(number, demand)

    def num_blocks_to_go_on(self) -> int | None:
        """See `LoopingPort.num_blocks_to_go_on`."""
        if self.scheduler.chunked_req is None:
            return None
        return -(-demand.tokens_to_go_on(self.scheduler, self.block_tokens) // self.block_tokens)

    def num_to_go_on(self, number: int, num_blocks: int) -> int:
        """See `LoopingPort.num_to_go_on`: a prompt has its state, and another one is cached."""
        return 1 if number and self.states is not None else num_blocks

    def give_up_part(self) -> None:
        """See `LoopingPort.give_up_part`."""
        requests.give_up_part(self.scheduler)

    def reopen(self, *, has_more: bool) -> None:
        """See `LoopingPort.reopen`.

        Only a request that ends opens what that closed: an engine on a device of its own gets
        memory from nobody else, and with nothing running it is never short of it.
        """
        if has_more or not self.scheduler.running_batch.reqs:
            self.scheduler.running_batch.batch_is_full = False

    def num_cached_blocks(self, number: int) -> int:
        """See `LoopingPort.num_cached_blocks`."""
        if self.scheduler is None:
            return 0
        if number and self.states is not None:
            return evictable_states(self.scheduler.tree_cache)
        num_tokens = requests.evictable_tokens(self.scheduler.tree_cache, number)
        return num_tokens // self.block_tokens

    def drop_cached(self, num_blocks: int) -> None:
        """See `LoopingPort.drop_cached`."""
        from kvcached_sglang.copied_first import drop

        drop(self.scheduler.tree_cache, num_blocks * self.block_tokens)
        if self.copies is not None:
            self.copies.settle()

    def evict(self, num_pages: int) -> bool:
        """See `EnginePort.evict`: states go with the tokens that end in them, or alone."""
        if super().evict(num_pages):
            return True
        if self.states is None or self.states.slots is None or not self.num_cached_blocks(1):
            return False
        before, slots = self._count_free(), self.states.slots
        num_states = num_pages * slots.pages.geometry.blocks_per_page
        drop_states(self.scheduler.tree_cache, num_states)
        return self._count_free() != before

    def finish_copies(self) -> None:
        """See `EnginePort.finish_copies`."""
        self.end_copies()

    def num_locked_blocks(self, number: int) -> int:
        """See `EnginePort.num_locked_blocks`."""
        if self.copies is None:
            return 0
        return self.copies.num_locked(number) // self.ids_of_block(number)

    def ids_of_block(self, number: int) -> int:
        """Return how many of SGLang's ids are a block of a pool: a state is one."""
        return 1 if number and self.states is not None else self.block_tokens

    def end_copies(self) -> bool:
        """See `EnginePort.end_copies`."""
        if self.copies is None or self.scheduler is None:
            return False
        return self.copies.finish(self.scheduler.tree_cache)

    def publish(self) -> None:
        """See `EnginePort.publish`: a paused loop would say nothing until it goes on."""
        publisher = getattr(self.scheduler, "kv_events_publisher", None)  # no part up to 0.5.12
        if publisher is not None:
            publisher.publish_kv_events()

    def hold_weights(self, num_missing: int) -> WeightStatus:
        """See `EnginePort.hold_weights`: batches run on a stream of their own."""
        if self.memory is not None:
            self.memory.backend.fence(self.stream()).wait()
        return super().hold_weights(num_missing)

    def show_waiting(self) -> None:
        """See `LoopingPort.show_waiting`: SGLang sets its gauges only with a batch."""
        now = time.monotonic()
        if now < self._shown_at + GAUGE_SECONDS:
            return
        self._shown_at = now
        reporter = getattr(self.scheduler, "metrics_reporter", self.scheduler)  # up to 0.5.12
        collector = getattr(reporter, "metrics_collector", None)
        publish = getattr(reporter, "_maybe_log_idle_metrics", None)
        if collector is not None and publish is not None:
            collector.last_log_time = 0.0  # it would wait for half a minute
            publish()
