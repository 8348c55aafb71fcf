"""The engine core's side: its instance, its block pool, and the orders that go to the workers."""

import atexit
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kvcached_core.config import Config
from kvcached_core.engine.instance import Instance
from kvcached_core.engine.placing import Placing, Planes, pool_settings
from kvcached_core.engine.start import model_name
from kvcached_core.errors import UnsupportedEngineError
from kvcached_core.memory.devices import Device
from kvcached_core.units import format_bytes
from kvcached_vllm.layout import PLACEMENT, Placement, plane_layout, request_blocks
from kvcached_vllm.startup import startup
from kvcached_vllm.worker import apply_orders, settle_orders

if TYPE_CHECKING:
    from kvcached_core.memory.geometry import Geometry
    from kvcached_core.memory.orders import PageOrders

logger = logging.getLogger("vllm.kvcached")

# Pages that who asks for many gets at once; the rest follows when all of it is evicted.
FIRST_PAGES = 8


class ElasticEngine:
    """One vLLM engine in the ledgers of its devices: from its start to its shutdown.

    It promises pages to the block pool (`PageSource`), sends what the pool decided to the workers,
    and gives memory back when it is asked to.

    Args:
        vllm_config: vLLM's settings.
        config: Ours.
        devices: The device of each rank.
        core: The engine core.
    """

    def __init__(self, vllm_config: Any, config: Config, devices: list[Device], core: Any) -> None:
        self.config = config
        self.vllm_config = vllm_config
        self.core = core
        self.geometry: Geometry | None = None
        self.pool: Any = None
        self.devices = devices
        self._is_wake_pending = False
        self.is_waiting = False  # as far as the ledger was told
        self._is_refused_now = False  # in this schedule
        self.instance = Instance(
            devices,
            config,
            name=config.name,
            default_name=model_name(vllm_config.model_config.model),
            engine=startup.engine,
            answer=self._on_ring,
        )
        self._placing = Placing(
            self.instance, config, devices[0], logger, length_setting="--max-model-len"
        )
        atexit.register(self.close)

    def reserve(self, num_pages: int, *, is_urgent: bool, num_spare: int = 0) -> int:
        """See `PageSource.reserve`."""
        granted = self.instance.reserve(num_pages, is_urgent=is_urgent, num_spare=num_spare)
        if is_urgent and granted < num_pages:
            self.is_waiting = self._is_refused_now = True
        return granted

    def cancel(self, num_pages: int) -> None:
        """See `PageSource.cancel`."""
        self.instance.cancel(num_pages)

    def place(self, kv_cache_configs: list[Any], granularity_bytes: int) -> None:
        """Choose the geometry and write each rank's placement on its config.

        Raises:
            UnsupportedEngineError: If the planes are not ours to lay out.
            ConfigError: If the pool cannot hold one request.
        """
        layouts = [plane_layout(config) for config in kv_cache_configs]
        widest = max(layouts, key=lambda layout: layout.num_planes)
        plan = kv_cache_configs[0]
        geometry = self._placing.place(
            Planes(
                widest.block_bytes,
                widest.num_planes,
                plan.num_blocks,
                request_blocks(plan, self.vllm_config),
            ),
            granularity_bytes,
        )
        self.geometry = geometry
        for config, layout, device in zip(kv_cache_configs, layouts, self.devices, strict=True):
            own = replace(geometry, num_planes=layout.num_planes)
            placement = Placement(own, self._placing.num_pages, self.instance.seat(device))
            setattr(config, PLACEMENT, placement)

    def build_pool(self, *args: Any, **kwargs: Any) -> Any:
        """Return the elastic block pool in the place of vLLM's own."""
        from kvcached_vllm.block_pool import ElasticBlockPool

        if self.geometry is None:
            raise UnsupportedEngineError("vLLM built its block pool before its KV cache plan")
        per_page = self.geometry.blocks_per_page
        if args:
            args = (args[0] // per_page * per_page, *args[1:])
        else:
            kwargs["num_gpu_blocks"] = kwargs["num_gpu_blocks"] // per_page * per_page
        low, high = self.config.spare_pages(self.devices[0].kind)
        self.pool = ElasticBlockPool(
            self.geometry,
            self,
            *args,
            options={
                "min_spare_pages": low,
                "max_spare_pages": high,
                "idle_seconds": self.config.idle_seconds,
            },
            **kwargs,
        )
        self.pool.engine = self
        return self.pool

    def flush(self, *, is_last: bool = False) -> None:
        """Carry out now, between two steps, what the pool decided."""
        self._send(self._drain(is_last=is_last))

    def end_schedule(self, num_waiting: int) -> None:
        """Take back that this engine waits for memory, if nobody in it does any more.

        Args:
            num_waiting: Requests that wait to be scheduled; while there are any, one that was
                refused may be among them.
        """
        is_refused, self._is_refused_now = self._is_refused_now, False
        if not is_refused and not num_waiting:
            self._clear_waiting()

    def end_burst(self) -> None:
        """Nothing runs any more: let idle pages linger, and see to it that they go in time.

        What is owed still goes now: the last requests left it in the cache. An engine in the
        caller's process has no loop that could be woken, so all its idle pages go now.
        """
        if self.pool is None:
            return
        if self.is_waiting:
            self._clear_waiting()
        if self.pool.owed_pages:
            self.pool.pay()
            self.publish_events()
        self.flush(is_last=not self._can_be_woken)
        due_seconds = self.pool.pages.seconds_until_due()
        if due_seconds is not None:
            self.instance.set_alarm(due_seconds)

    def answer(self) -> None:
        """Give back what others or the limit want: idle pages, cached ones, then requests' own.

        Requests stop in the next schedule: see `kv_cache_manager_allocate_slots`.
        """
        if self.pool is None or not self.instance.has_news():
            return
        asked_pages, owed_pages = self.instance.wanted_pages()
        # An idle engine has nothing better to do than to see its first pages go.
        is_idle = not self.core.scheduler.has_unfinished_requests()
        num_released = 0
        for num_released in self.pool.release_one_by_one(asked_pages):
            if num_released == FIRST_PAGES and is_idle:
                self._give()
                self._call_workers(settle_orders)
        # Also when nothing is asked any more: a limit that was lifted leaves no debt.
        self.pool.owed_pages = max(min(asked_pages - num_released, owed_pages), 0)
        if asked_pages:
            self._give()
            self.publish_events()

    def publish_events(self) -> None:
        """Tell who mirrors the prefix cache what left it: an idle engine makes no step that would.

        Events of a step's own stay in order: vLLM publishes what is queued when a step ends.
        """
        scheduler = self.core.scheduler
        events = scheduler.kv_cache_manager.take_events()
        if events:
            from vllm.distributed.kv_events import KVEventBatch

            batch = KVEventBatch(ts=time.time(), events=events)
            scheduler.kv_event_publisher.publish(batch)

    def empty(self) -> None:
        """Give everything back but page 0, before the engine sleeps; return when it is done."""
        if self.pool is not None:
            self._clear_waiting()
            self.pool.release_pages(self.pool.pages.num_pages)
            self.flush()
            self._call_workers(settle_orders)
            self.publish_events()

    def explain_size(self) -> str:
        """Say where the size comes from that vLLM calls available memory."""
        size = self.config.virtual_bytes(self.instance.capacity_bytes)
        return (
            f"what vLLM calls available memory is what this engine may take here, "
            f"{format_bytes(size)}; raise {pool_settings(self.devices[0])}, or lower "
            "--max-model-len"
        )

    def close(self) -> None:
        """Leave the ledgers."""
        atexit.unregister(self.close)
        self.instance.close()

    @property
    def _can_be_woken(self) -> bool:
        return hasattr(self.core, "input_queue")

    def _give(self) -> None:
        orders = self._drain(is_last=False)
        self.instance.answer(len(orders.unmap_pages) if orders else 0)
        self._send(orders)

    def _drain(self, *, is_last: bool) -> "PageOrders | None":
        return self.pool.drain(is_last=is_last) if self.pool is not None else None

    def _send(self, orders: "PageOrders | None") -> None:
        if orders is not None:
            self._call_workers(apply_orders, orders)

    def _call_workers(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        return self.core.model_executor.collective_rpc(function, args=args)

    def _on_ring(self) -> None:
        # Runs in the bell's thread: only the engine's own thread may touch its pool. A busy engine
        # sees what it is asked for after its step; an idle one has to be woken.
        # One callback is enough for all rings until it runs: it looks at what all of them asked.
        if self.pool is not None and self._can_be_woken and not self._is_wake_pending:
            from vllm.v1.engine import EngineCoreRequestType

            self._is_wake_pending = True
            self.core._idle_state_callbacks.append(lambda _core: self._wake())
            self.core.input_queue.put_nowait((EngineCoreRequestType.WAKEUP, None))

    def _wake(self) -> None:
        self._is_wake_pending = False  # before it looks: who rings from now on is heard again
        self.answer()
        if not self.core.scheduler.has_unfinished_requests():
            self.end_burst()

    def _clear_waiting(self) -> None:
        self.is_waiting = self._is_refused_now = False
        self.instance.clear_waiting()
