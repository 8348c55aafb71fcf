"""SGLang as our engine sees it: what it asks of SGLang, and how its orders are carried out."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvcached_core.memory.orders import PageOrders
from kvcached_sglang import requests

if TYPE_CHECKING:
    from kvcached_core.memory.rank import RankMemory
    from kvcached_sglang.free_list import FreeList

GAUGE_SECONDS = 1.0


class SglangPort:
    """The `EnginePort` of SGLang, whose scheduler and worker are one process.

    Attributes:
        can_be_woken: Its loop never sleeps, and looks by itself.
        scheduler: SGLang's, from its first schedule on.
        has_batch: Whether the last schedule made a batch.
        memory: This rank's, from SGLang's first pool on.
        free_lists: Those of its allocators, that of the pool of all layers first.

    Args:
        current_stream: Returns the stream that torch launches on.
    """

    can_be_woken = True

    def __init__(self, current_stream: Callable[[], int] = lambda: 0) -> None:
        self.scheduler: Any = None
        self.has_batch = False
        self.memory: RankMemory | None = None
        self.free_lists: list[FreeList] = []
        self._current_stream = current_stream
        self._later: PageOrders | None = None  # of which a part waits for the launches
        self._published_at = 0.0

    def stream(self) -> int:
        """Return the stream that a batch runs on beside the next schedule.

        There it reads what was freed for that schedule.
        """
        stream = getattr(self.scheduler, "forward_stream", None)
        handle = getattr(stream, "cuda_stream", None)  # the host's have none
        return self._current_stream() if handle is None else int(handle)

    def is_busy(self) -> bool:
        """See `EnginePort.is_busy`."""
        return self.scheduler is not None and requests.is_busy(self.scheduler)

    def is_live(self) -> bool:
        """See `EnginePort.is_live`."""
        return self.has_batch or bool(self.scheduler.running_batch.reqs)

    def num_waiting(self) -> int:
        """See `EnginePort.num_waiting`."""
        return len(self.scheduler.waiting_queue)

    def num_idle_blocks(self) -> int:
        """See `EnginePort.num_idle_blocks`: of the pool of all layers."""
        free_list = self.free_lists[0]
        return free_list.num_free_blocks + self.evictable_tokens(0) // free_list.block_tokens

    def evictable_tokens(self, number: int) -> int:
        """Return the tokens that only the prefix cache wants in the pool with this number."""
        if self.scheduler is None:
            return 0
        return requests.evictable_tokens(self.scheduler.tree_cache, number)

    def carry_out(self, orders: PageOrders | None, *, wait: bool) -> None:
        """See `EnginePort.carry_out`."""
        self.begin_step(orders)
        self.carry_out_later()
        if wait and self.memory is not None:
            self.memory.keeper.wait()

    def begin_step(self, orders: PageOrders | None) -> None:
        """Map what the next step needs; the rest would hold its launches up, and waits for them."""
        self.carry_out_later()
        if orders is not None and self.memory is not None:
            self._later = orders
            self.memory.before_step(orders)

    def carry_out_later(self) -> None:
        """Begin with what waited for the launches of the last step."""
        if self._later is not None and self.memory is not None:
            orders, self._later = self._later, None
            self.memory.after_step(orders)

    def evict(self, num_pages: int) -> bool:
        """See `EnginePort.evict`."""
        from sglang.srt.mem_cache.base_prefix_cache import EvictParams

        if not self.evictable_tokens(0):
            return False
        before = [free_list.num_free_blocks for free_list in self.free_lists]
        free_list = self.free_lists[0]
        num_blocks = num_pages * free_list.pages.geometry.blocks_per_page
        num_tokens = num_blocks * free_list.block_tokens
        self.scheduler.tree_cache.evict(EvictParams(num_tokens=num_tokens))
        return before != [free_list.num_free_blocks for free_list in self.free_lists]

    def publish(self) -> None:
        """See `EnginePort.publish`: SGLang's loop does it, also in a turn that runs nothing."""

    def publish_gauges(self) -> None:
        """Let SGLang's gauges say what waits, now and then: it sets them only with a batch."""
        now = time.monotonic()
        if now < self._published_at + GAUGE_SECONDS:
            return
        self._published_at = now
        reporter = getattr(self.scheduler, "metrics_reporter", self.scheduler)  # up to 0.5.12
        collector = getattr(reporter, "metrics_collector", None)
        publish = getattr(reporter, "_maybe_log_idle_metrics", None)
        if collector is not None and publish is not None:
            collector.last_log_time = 0.0  # it would wait for half a minute
            publish()

    def wake(self, answer: Callable[[], None]) -> None:
        """See `EnginePort.wake`: its loop is awake."""
