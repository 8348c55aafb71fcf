"""vLLM as our engine sees it: what it asks of vLLM, and how its orders reach the workers."""

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvcached_core.engine.port import EnginePort
from kvcached_core.memory.orders import PageOrders
from kvcached_core.weights.status import WeightStatus, merge
from kvcached_vllm.elastic_weights import (
    finish_weights,
    hold_weights,
    merged,
    weight_status,
)
from kvcached_vllm.left_behind import LeftBehind
from kvcached_vllm.open_copies import OpenCopies, finish_copies
from kvcached_vllm.worker import carry_out

if TYPE_CHECKING:
    from kvcached_vllm.block_pool import ElasticBlockPool

# How soon an engine is woken again that has not come so far in its start that it could be.
START_SECONDS = 0.1


class VllmPort(EnginePort):
    """The `EnginePort` of vLLM.

    Args:
        core: The engine core.
    """

    pool: "ElasticBlockPool"  # once vLLM has built it
    copies: OpenCopies | None = None  # with a connector, once the pool is built
    left: LeftBehind | None = None  # the same, with layers that keep only the last tokens

    def __init__(self, core: Any) -> None:
        self.core = core

    @property
    def can_be_woken(self) -> bool:
        return hasattr(self.core, "input_queue")

    def is_busy(self) -> bool:
        if self.core.scheduler.get_request_counts()[0]:  # vLLM calls none unfinished in a pause
            return True
        if self.copies is not None and self.can_be_woken:
            return self.has_copies_to_end()
        return bool(self.core.scheduler.has_unfinished_requests())

    def has_copies_to_end(self) -> bool:
        """Return whether a request, or a copy of one that has ended, needs another step."""
        return bool(self.core.scheduler.has_requests())

    def is_live(self) -> bool:
        return self.pool.num_used_blocks > 0

    def num_waiting(self) -> int:
        return int(self.core.scheduler.get_request_counts()[1])

    def num_idle_blocks(self) -> int:
        return self.pool.num_idle_blocks

    def carry_out(self, orders: PageOrders | None, *, wait: bool) -> None:
        self.core.model_executor.collective_rpc(carry_out, args=(orders, wait))

    def evict(self, num_pages: int) -> bool:
        return self.pool.evict_pages(num_pages)

    def finish_copies(self) -> None:
        if self.copies is not None:
            job_ids = self.copies.job_ids
            self.core.model_executor.collective_rpc(finish_copies, args=(job_ids,))
            self.copies.clear()

    def publish(self) -> None:
        # An idle engine makes no step that would. Events of a step's own stay in order: vLLM
        # publishes what is queued when a step ends.
        scheduler = self.core.scheduler
        events = scheduler.kv_cache_manager.take_events()
        if events:
            from vllm.distributed.kv_events import KVEventBatch

            batch = KVEventBatch(ts=time.time(), events=events)
            scheduler.kv_event_publisher.publish(batch)

    def weight_status(self) -> WeightStatus | None:
        return merged(self.core.model_executor.collective_rpc(weight_status))

    def hold_weights(self, num_missing: int) -> WeightStatus:
        return merge(self.core.model_executor.collective_rpc(hold_weights, args=(num_missing,)))

    def finish_weights(self) -> None:
        self.core.model_executor.collective_rpc(finish_weights)

    def wake(self, answer: Callable[[], None]) -> None:
        from vllm.v1.engine import EngineCoreRequestType

        if not hasattr(self.core, "_idle_state_callbacks"):  # the engine is not quite there
            again = threading.Timer(START_SECONDS, self.wake, (answer,))
            again.daemon = True  # a start may fail, and then its process shall end
            again.start()
            return
        self.core._idle_state_callbacks.append(lambda _core: answer())
        self.core.input_queue.put_nowait((EngineCoreRequestType.WAKEUP, None))
