"""The engine core's side: the ledger, the block pool, and the orders that go to the workers."""

import atexit
import functools
import logging
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcached_core.config import Config, read_config
from kvcached_core.errors import ConfigError, LedgerError, UnsupportedEngineError
from kvcached_core.geometry import Geometry, choose_geometry
from kvcached_core.ledger import Ledger, doorbell_path, ledger_directory
from kvcached_core.pressure import Doorbell, ring
from kvcached_core.units import format_bytes
from kvcached_core.vmm.host import HostBackend
from kvcached_vllm import startup
from kvcached_vllm.layout import PLACEMENT, Placement, plane_layout
from kvcached_vllm.worker import apply_orders

if TYPE_CHECKING:
    from kvcached_core.page_pool import PageOrders

logger = logging.getLogger("vllm.kvcached")

HOST_DEVICE = "host"
ORDERS = "kvcached_orders"

_starting: ContextVar["ElasticEngine | None"] = ContextVar("kvcached_starting", default=None)
_building_pool: ContextVar[bool] = ContextVar("kvcached_building_pool", default=False)


class ElasticEngine:
    """One vLLM engine in the ledger: from its start to its shutdown.

    It promises pages to the block pool (`PageSource`), sends what the pool decided to the workers,
    and gives memory back when its bell rings.
    """

    def __init__(self, vllm_config: Any, config: Config) -> None:
        self.config = config
        self.vllm_config = vllm_config
        directory = ledger_directory(config.dir)
        self.ledger = Ledger(directory / f"{HOST_DEVICE}.ledger", config.host_pool)
        self.page_bytes = 0
        self.geometry: Geometry | None = None
        self.pool: Any = None
        self.core: Any = None
        self._bell: Doorbell | None = None
        try:
            self.row = self.ledger.register(
                name=config.name or _free_name(self.ledger, vllm_config),
                engine=f"vllm {startup.installed_release()}",
                virtual_bytes=config.virtual_bytes,
                limit_bytes=config.limit_bytes,
            )
            self._bell = Doorbell(doorbell_path(self.ledger.path, self.row), self._on_ring)
            atexit.register(self.close)
        except BaseException:
            self.close()
            raise

    def reserve(self, num_pages: int, *, is_urgent: bool) -> int:
        """Promise up to `num_pages` pages; if it is urgent, ask the others for what is missing."""
        wanted = num_pages * self.page_bytes
        granted = self.ledger.reserve(self.row, wanted, self.page_bytes)
        if granted < wanted and is_urgent:
            for peer in self.ledger.ask_peers(self.row, wanted - granted):
                ring(doorbell_path(self.ledger.path, peer))
        return granted // self.page_bytes

    def cancel(self, num_pages: int) -> None:
        """Take back a promise of `num_pages` pages."""
        self.ledger.cancel(self.row, num_pages * self.page_bytes)

    def place(self, kv_cache_configs: list[Any]) -> None:
        """Choose the geometry and write each rank's placement on its config.

        Raises:
            UnsupportedEngineError: If the planes are not ours to lay out.
            ConfigError: If the pool cannot hold one request.
        """
        layouts = [plane_layout(config) for config in kv_cache_configs]
        widest = max(layouts, key=lambda layout: layout.num_planes)
        geometry = choose_geometry(
            block_bytes=widest.block_bytes,
            num_planes=widest.num_planes,
            granularity_bytes=HostBackend().granularity_bytes,
            target_page_bytes=self.config.page_bytes,
        )
        num_blocks = kv_cache_configs[0].num_blocks
        num_pages = num_blocks // geometry.blocks_per_page
        geometry.check_ids(num_pages)
        self._check_one_request_fits(kv_cache_configs[0], geometry, num_pages)
        self.geometry = geometry
        self.page_bytes = geometry.page_bytes
        self.ledger.describe(
            self.row, page_bytes=self.page_bytes, virtual_bytes=num_pages * self.page_bytes
        )
        if not self.reserve(1, is_urgent=True):
            free_bytes = self.ledger.view().free_bytes
            raise ConfigError(
                f"the pool has no room for this engine's first page: needed {self.page_bytes} "
                f"bytes, available {free_bytes}; stop another engine or raise KVCACHED_HOST_POOL"
            )
        for config, layout in zip(kv_cache_configs, layouts, strict=True):
            own = replace(geometry, num_planes=layout.num_planes)
            placement = Placement(own, num_pages, str(self.ledger.path), self.row)
            setattr(config, PLACEMENT, placement)
        logger.info(
            "kvcached: %d pages of %s, %d blocks each, in a pool of %s",
            num_pages,
            format_bytes(self.page_bytes),
            geometry.blocks_per_page,
            format_bytes(self.ledger.capacity_bytes),
        )

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
        self.pool = ElasticBlockPool(
            self.geometry,
            self,
            *args,
            min_spare_pages=self.config.min_spare_pages,
            max_spare_pages=self.config.max_spare_pages,
            idle_seconds=self.config.idle_seconds,
            **kwargs,
        )
        return self.pool

    def flush(self) -> None:
        """Carry out now, between two steps, what the pool decided."""
        orders = self.pool.pages.drain() if self.pool is not None else None
        if orders is not None:
            self.core.model_executor.collective_rpc(apply_orders, args=(orders,))

    def answer(self) -> None:
        """Give back what others asked for, as far as no request needs it."""
        asked_bytes = self.ledger.asked_bytes(self.row)
        if asked_bytes and self.pool is not None:
            self.pool.release_pages(ceil(asked_bytes / self.page_bytes))
            self.flush()
            self.ledger.answer(self.row)

    def close(self) -> None:
        """Leave the ledger."""
        atexit.unregister(self.close)
        if self._bell is not None:
            self._bell.close()
            self._bell = None
            self.ledger.unregister(self.row)
        self.ledger.close()

    def _on_ring(self) -> None:
        # Runs in the bell's thread: only the engine's own thread may touch its pool. A busy engine
        # sees what it is asked for after its step; an idle one has to be woken.
        core = self.core
        if core is not None and hasattr(core, "input_queue"):
            from vllm.v1.engine import EngineCoreRequestType

            core._idle_state_callbacks.append(lambda _core: self.answer())
            core.input_queue.put_nowait((EngineCoreRequestType.WAKEUP, None))

    def _check_one_request_fits(self, config: Any, geometry: Geometry, num_pages: int) -> None:
        needed = sum(
            ceil(
                group.kv_cache_spec.max_memory_usage_bytes(self.vllm_config)
                / group.kv_cache_spec.page_size_bytes
            )
            for group in config.kv_cache_groups
        )
        available = num_pages * geometry.blocks_per_page - 1
        if needed > available:
            block_bytes = geometry.num_planes * geometry.block_bytes
            raise ConfigError(
                f"the pool is smaller than one request of max_model_len="
                f"{self.vllm_config.model_config.max_model_len}: needed {needed} blocks "
                f"({format_bytes(needed * block_bytes)}), available {max(available, 0)} in "
                f"{num_pages} pages of {format_bytes(geometry.page_bytes)}; raise "
                "KVCACHED_HOST_POOL or KVCACHED_LIMIT, or lower --max-model-len"
            )


def _free_name(ledger: Ledger, vllm_config: Any) -> str:
    """Return the model's last name, with a number behind it if it is taken."""
    name = Path(str(vllm_config.model_config.model)).name or "vllm"
    taken = {instance.name for instance in ledger.view().instances}
    candidates = (name, *(f"{name}-{number}" for number in range(2, len(taken) + 3)))
    return next(candidate for candidate in candidates if candidate not in taken)


def engine_core_initialize_kv_caches(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `EngineCore._initialize_kv_caches`: an engine's memory begins here.

    A spawned engine core loads plugins inside `EngineCore.__init__`, so that is too early a place.
    """

    @functools.wraps(original)
    def wrapper(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        engine = _start_engine(vllm_config)
        if engine is None:
            return original(self, vllm_config, *args, **kwargs)
        self.kvcached = engine
        engine.core = self
        _starting.set(engine)
        try:
            return original(self, vllm_config, *args, **kwargs)
        except BaseException as error:
            _starting.set(None)
            engine.close()
            if isinstance(error, ValueError):  # vLLM's own word that one request does not fit
                error.add_note(
                    "kvcached: what vLLM calls available memory is the pool here, "
                    f"{format_bytes(engine.config.virtual_bytes)}; raise KVCACHED_HOST_POOL or "
                    "KVCACHED_LIMIT, or lower --max-model-len"
                )
            raise

    return wrapper


def _start_engine(vllm_config: Any) -> ElasticEngine | None:
    try:
        startup.check_configuration(vllm_config)
    except UnsupportedEngineError as error:
        startup.refuse(error)
        return None
    try:
        return ElasticEngine(vllm_config, read_config())
    except (ConfigError, LedgerError) as error:
        raise SystemExit(f"kvcached: {error}") from error


def _engine_of(core: Any) -> ElasticEngine | None:
    engine: ElasticEngine | None = getattr(core, "kvcached", None)
    return engine


def engine_core_post_step(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap `EngineCore.post_step`: answer who asks, and leave nothing behind the last request.

    An engine in the caller's process makes no further step that could carry the last orders.
    """

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        engine = _engine_of(self)
        if engine is not None:
            engine.answer()
            if not self.scheduler.has_unfinished_requests():
                engine.flush()

    return wrapper


def engine_core_reset_prefix_cache(original: Callable[..., bool]) -> Callable[..., bool]:
    """Wrap `EngineCore.reset_prefix_cache`: unmap what it emptied."""

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> bool:
        done = original(self, *args, **kwargs)
        engine = _engine_of(self)
        if engine is not None:
            engine.flush()
        return done

    return wrapper


def engine_core_shutdown(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap `EngineCore.shutdown`: leave the ledger after the workers."""

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            original(self, *args, **kwargs)
        finally:
            engine: ElasticEngine | None = self.__dict__.pop("kvcached", None)
            if engine is not None:
                engine.close()

    return wrapper


def executor_initialize_from_config(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap `Executor.initialize_from_config`: it sees the plans of all ranks."""

    @functools.wraps(original)
    def wrapper(self: Any, kv_cache_configs: list[Any], *args: Any, **kwargs: Any) -> None:
        engine = _starting.get()
        if engine is not None:
            try:
                engine.place(kv_cache_configs)
            except ConfigError as error:
                raise SystemExit(f"kvcached: {error}") from error
            except UnsupportedEngineError as error:
                startup.refuse(error)
                _starting.set(None)
                engine.core.__dict__.pop("kvcached").close()
        original(self, kv_cache_configs, *args, **kwargs)

    return wrapper


def kv_cache_manager_init(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap `KVCacheManager.__init__`: the block pool built inside is the scheduler's own."""

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        token = _building_pool.set(True)
        try:
            original(self, *args, **kwargs)
        finally:
            _building_pool.reset(token)

    return wrapper


def block_pool_factory(original: Any) -> Any:
    """Stand in for the name `BlockPool` in the coordinator's module."""

    @functools.wraps(original, updated=())
    def factory(*args: Any, **kwargs: Any) -> Any:
        engine = _starting.get() if _building_pool.get() else None
        if engine is None:
            return original(*args, **kwargs)
        _starting.set(None)
        return engine.build_pool(*args, **kwargs)

    return factory


def kv_cache_manager_allocate_slots(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `KVCacheManager.allocate_slots`: before it gives up, ask the ledger for pages.

    What is promised for this and then not needed goes back at the end of the schedule.
    """

    @functools.wraps(original)
    def wrapper(self: Any, request: Any, num_new_tokens: int, *args: Any, **kwargs: Any) -> Any:
        blocks = original(self, request, num_new_tokens, *args, **kwargs)
        if blocks is not None or not hasattr(self.block_pool, "pages"):
            return blocks
        missing = _missing_blocks(self, request, num_new_tokens, kwargs)
        if not self.block_pool.pages.reserve_blocks(missing, is_urgent=True):
            return None
        return original(self, request, num_new_tokens, *args, **kwargs)

    return wrapper


def _missing_blocks(
    manager: Any, request: Any, num_new_tokens: int, options: dict[str, Any]
) -> int:
    """Return how many blocks more the request may need at most: prefix hits are not counted."""
    num_tokens = max(request.num_tokens, request.num_computed_tokens + num_new_tokens)
    num_tokens += options.get("num_lookahead_tokens", 0)
    held = manager.get_block_ids(request.request_id)
    groups = manager.kv_cache_config.kv_cache_groups
    needed = sum(
        max(-(-num_tokens // group.kv_cache_spec.block_size) - len(ids), 0)
        for group, ids in zip(groups, held, strict=True)
    )
    needed += options.get("reserved_blocks", 0) + getattr(manager, "watermark_blocks", 0)
    return max(needed - int(manager.block_pool.get_num_free_blocks()), 1)


def scheduler_schedule(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `Scheduler.schedule`: the orders ride on its output."""

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        pages = getattr(self.kv_cache_manager.block_pool, "pages", None)
        orders: PageOrders | None = pages.drain() if pages is not None else None
        if orders is not None:
            setattr(output, ORDERS, orders)
        return output

    return wrapper
