"""What takes the place of vLLM's engine methods; each gets the original and returns a wrapper."""

import functools
import logging
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from kvcached_core.config import read_config
from kvcached_vllm.engine import ElasticEngine
from kvcached_vllm.obstacles import obstacles
from kvcached_vllm.sleeping import asleep_bytes, room_to_wake
from kvcached_vllm.startup import startup
from kvcached_vllm.worker_hooks import device_of, granularity_of

if TYPE_CHECKING:
    from kvcached_core.memory.orders import PageOrders

logger = logging.getLogger("vllm.kvcached")

ORDERS = "kvcached_orders"

# A kernel under a sliding window begins to read at the start of a tile, below the window. No kernel
# of vLLM has tiles of more tokens than this; FlashAttention 3's largest have 224 (fp8).
MAX_TILE_TOKENS = 256

_starting: ContextVar["ElasticEngine | None"] = ContextVar("kvcached_starting", default=None)
_building_pool: ContextVar[bool] = ContextVar("kvcached_building_pool", default=False)


def engine_core_initialize_kv_caches(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `EngineCore._initialize_kv_caches`: an engine's memory begins here.

    A spawned engine core loads plugins inside `EngineCore.__init__`, so that is too early a place.
    """

    @functools.wraps(original)
    def wrapper(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        engine = _start_engine(vllm_config, self)
        if engine is None:
            return original(self, vllm_config, *args, **kwargs)
        self.kvcached = engine
        _starting.set(engine)
        try:
            with startup.one_message():
                return original(self, vllm_config, *args, **kwargs)
        except BaseException as error:
            _starting.set(None)
            if isinstance(error, ValueError):  # vLLM's own word that one request does not fit
                error.add_note(f"kvcached: {engine.explain_size()}")
            engine.close()
            raise

    return wrapper


def _start_engine(vllm_config: Any, core: Any) -> ElasticEngine | None:
    if not startup.serves(obstacles(vllm_config)):
        return None
    devices = core.model_executor.collective_rpc(device_of)
    with startup.one_message():
        return ElasticEngine(vllm_config, read_config(), devices, core)


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
        engine: ElasticEngine | None = getattr(self, "kvcached", None)
        if engine is not None:
            engine.answer()
            if not self.scheduler.has_unfinished_requests():
                engine.end_burst()

    return wrapper


def engine_core_reset_prefix_cache(original: Callable[..., bool]) -> Callable[..., bool]:
    """Wrap `EngineCore.reset_prefix_cache`: unmap what it emptied."""

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> bool:
        done = original(self, *args, **kwargs)
        engine = _engine_of(self)
        if engine is not None:
            engine.flush(is_last=True)
            engine.publish_events()
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
        if engine is not None and not any(plan.kv_cache_tensors for plan in kv_cache_configs):
            logger.info("kvcached: this model has no KV cache, so there is nothing to share")
            _starting.set(None)
            engine.core.__dict__.pop("kvcached").close()
        elif engine is not None:
            self.kvcached = engine
            engine.place(kv_cache_configs, self.collective_rpc(granularity_of)[0])
        original(self, kv_cache_configs, *args, **kwargs)

    return wrapper


def executor_sleep(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap `Executor.sleep`: a sleeping engine keeps page 0 alone."""

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        engine: ElasticEngine | None = getattr(self, "kvcached", None)
        if engine is not None:
            engine.empty()
        original(self, *args, **kwargs)

    return wrapper


def executor_wake_up(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap `Executor.wake_up`: room is made before anything is allocated, or the call refused."""

    @functools.wraps(original)
    def wrapper(self: Any, tags: list[str] | None = None, *args: Any, **kwargs: Any) -> None:
        engine: ElasticEngine | None = getattr(self, "kvcached", None)
        if engine is None or not self.is_sleeping:
            original(self, tags, *args, **kwargs)
            return
        with room_to_wake(engine.instance, self.collective_rpc(asleep_bytes, args=(tags,))):
            original(self, tags, *args, **kwargs)

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

    What is promised for this and then not needed goes back at the end of the schedule. While pages
    are owed, nobody gets slots: vLLM preempts one request after the other until they are paid.
    """

    @functools.wraps(original)
    def wrapper(self: Any, request: Any, num_new_tokens: int, *args: Any, **kwargs: Any) -> Any:
        pool = self.block_pool
        owed_pages: int | None = getattr(pool, "owed_pages", None)  # only our pool has it
        if owed_pages and not pool.pay():
            return None
        blocks = original(self, request, num_new_tokens, *args, **kwargs)
        if blocks is not None or owed_pages is None:
            return blocks
        missing = _missing_blocks(self, request, num_new_tokens, kwargs)
        missing_pages = -(-missing // pool.pages.geometry.blocks_per_page)
        if not pool.pages.promise(missing_pages, is_urgent=True):
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
        pool = self.kv_cache_manager.block_pool
        if not hasattr(pool, "pages"):
            return output
        if pool.engine.is_waiting:
            _, num_waiting = self.get_request_counts()
            pool.engine.end_schedule(num_waiting)
        orders: PageOrders | None = pool.drain()
        if orders is not None:
            setattr(output, ORDERS, orders)
        return output

    return wrapper


def get_num_skipped_tokens(original: Callable[..., int]) -> Callable[..., int]:
    """Wrap `SlidingWindowManager.get_num_skipped_tokens`: free a tile behind the window.

    Kernels read, and then mask, blocks in front of a sliding window that lie in its first tile. In
    vanilla they are somebody else's, which does no harm; here they might be unmapped.
    """

    @functools.wraps(original)
    def wrapper(self: Any, num_computed_tokens: int) -> int:
        num_skipped = original(self, num_computed_tokens)
        if not num_skipped or not hasattr(self.block_pool, "pages"):
            return num_skipped
        return num_skipped - MAX_TILE_TOKENS if num_skipped > MAX_TILE_TOKENS else 0

    return wrapper
