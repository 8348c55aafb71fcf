"""What takes the place of vLLM's engine methods; each gets the original and returns a wrapper."""

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from kvcached_core.config import read_config
from kvcached_core.engine.kinds import elastic_parts
from kvcached_patches.around import around, around_ours, setting
from kvcached_vllm.engine import VllmEngine
from kvcached_vllm.left_behind import left_behind
from kvcached_vllm.obstacles import obstacles
from kvcached_vllm.sleeping import asleep_bytes
from kvcached_vllm.startup import startup
from kvcached_vllm.worker_hooks import device_of, granularity_of

ORDERS = "kvcached_orders"

# A kernel under a sliding window begins to read at the start of a tile, below the window. No kernel
# of vLLM has tiles of more tokens than this; FlashAttention 3's largest have 224 (fp8).
MAX_TILE_TOKENS = 256

_building_pool: ContextVar[VllmEngine | None] = ContextVar("kvcached_building_pool", default=None)


@around
def engine_core_initialize_kv_caches(
    original: Any, self: Any, vllm_config: Any, *args: Any, **kwargs: Any
) -> Any:
    """Wrap `EngineCore._initialize_kv_caches`: an engine's memory begins here.

    A spawned engine core loads plugins inside `EngineCore.__init__`, so that is too early a place.
    """
    engine = _start_engine(vllm_config, self)
    if engine is None:
        return original(self, vllm_config, *args, **kwargs)
    self.kvcached = self.model_executor.kvcached = engine
    try:
        with startup.one_message():
            plan = original(self, vllm_config, *args, **kwargs)
    except BaseException as error:
        if isinstance(error, ValueError):  # vLLM's own word that one request does not fit
            error.add_note(f"kvcached: {engine.placing.explain_size()}")
        engine.close()
        raise
    plan.kvcached = self.kvcached  # the scheduler's block manager is made of it
    return plan


def _start_engine(vllm_config: Any, core: Any) -> VllmEngine | None:
    if not startup.serves(obstacles(vllm_config)):
        return None
    devices = core.model_executor.collective_rpc(device_of)
    with startup.one_message():
        return VllmEngine(vllm_config, read_config(), devices, core)


@around_ours
def engine_core_post_step(call: Any, engine: VllmEngine, self: Any) -> None:
    """Wrap `EngineCore.post_step`: answer who asks, and leave nothing behind the last request.

    An engine in the caller's process makes no further step that could carry the last orders.
    """
    call()
    engine.between_steps()
    if not (self.scheduler.has_unfinished_requests() or engine.port.is_busy()):
        engine.rest()


@around
def engine_core_reset_prefix_cache(
    original: Any,
    self: Any,
    reset_running_requests: bool = False,  # noqa: FBT001, FBT002  vLLM's own
    reset_connector: bool = False,  # noqa: FBT001, FBT002
    *args: Any,
    **kwargs: Any,
) -> bool:
    """Wrap `EngineCore.reset_prefix_cache`: unmap what it emptied.

    A connector that is reset forgets its copies, also those that are under way.
    """
    done: bool = original(self, reset_running_requests, reset_connector, *args, **kwargs)
    engine: VllmEngine | None = getattr(self, "kvcached", None)
    if engine is None:
        return done
    if reset_connector and engine.port.copies is not None:
        engine.finish_copies()
        engine.port.copies.reset()
    engine.flush(is_last=True)
    engine.port.publish()
    return done


@around_ours
def engine_core_shutdown(call: Any, engine: VllmEngine, self: Any) -> None:
    """Wrap `EngineCore.shutdown`: leave the ledger after the workers."""
    try:
        call()
    finally:
        self.kvcached = None
        engine.close()


@around
def executor_initialize_from_config(
    original: Any, self: Any, kv_cache_configs: list[Any], *args: Any, **kwargs: Any
) -> None:
    """Wrap `Executor.initialize_from_config`: it sees the plans of all ranks."""
    engine: VllmEngine | None = getattr(self, "kvcached", None)
    if engine is not None and not any(plan.kv_cache_tensors for plan in kv_cache_configs):
        startup.logger.info(
            "kvcached: nothing of this model is elastic: it has no KV cache, and its weights stay"
        )
        self.kvcached = engine.port.core.kvcached = None
        engine.close()
    elif engine is not None:
        engine.place(kv_cache_configs, self.collective_rpc(granularity_of)[0])
        _say_what_is_elastic(engine.vllm_config.model_config)
    original(self, kv_cache_configs, *args, **kwargs)


def _say_what_is_elastic(model: Any) -> None:
    is_multimodal, generates = model.is_multimodal_model, model.runner_type != "pooling"
    parts = elastic_parts("vLLM", generates=generates, is_multimodal=is_multimodal)
    if parts is not None:
        startup.logger.info("kvcached: %s", parts)


@around
def executor_sleep(original: Any, self: Any, level: int = 1, *args: Any, **kwargs: Any) -> None:
    """Wrap `Executor.sleep`: a sleeping engine keeps page 0 alone.

    At level 2 vLLM may save parameters. Those that yield may be gone by now, and are kept by us.
    """
    engine: VllmEngine | None = getattr(self, "kvcached", None)
    if engine is None:
        original(self, level, *args, **kwargs)
        return
    engine.empty()
    original(self, 1 if engine.yields_weights else level, *args, **kwargs)
    engine.activation.sleep()


@around
def executor_wake_up(
    original: Any, self: Any, tags: list[str] | None = None, *args: Any, **kwargs: Any
) -> Any:
    """Wrap `Executor.wake_up`: room is made before anything is allocated, or the call refused."""
    engine: VllmEngine | None = getattr(self, "kvcached", None)
    if engine is None or not self.is_sleeping:
        return original(self, tags, *args, **kwargs)
    num_bytes = max(self.collective_rpc(asleep_bytes, args=(tags,)))
    has_weights = engine.yields_weights and (not tags or "weights" in tags)
    with engine.room_to_wake(num_bytes, has_weights=has_weights):
        result = original(self, tags, *args, **kwargs)
    if has_weights and not engine.port.is_busy():
        engine.rest()
    return result


@around
def kv_cache_manager_init(
    original: Any, self: Any, kv_cache_config: Any, *args: Any, **kwargs: Any
) -> None:
    """Wrap `KVCacheManager.__init__`: the block pool built inside is the scheduler's own."""
    with setting(_building_pool, kv_cache_config.__dict__.pop("kvcached", None)):
        original(self, kv_cache_config, *args, **kwargs)


def block_pool_factory(original: Any) -> Any:
    """Stand in for the name `BlockPool` in the coordinator's module."""

    @functools.wraps(original, updated=())
    def factory(*args: Any, **kwargs: Any) -> Any:
        engine = _building_pool.get()
        return (original if engine is None else engine.build_pool)(*args, **kwargs)

    return factory


def kv_cache_manager_allocate_slots(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `KVCacheManager.allocate_slots`: what a request needs is promised before vLLM looks.

    vLLM counts the blocks that it needs, and then compares them with those that are free. Most
    tokens of an answer need none, and find more free than they could need at all.

    While pages are owed, nobody gets slots: vLLM preempts one request after the other until they
    are paid. The same holds while weights are missing; then nothing runs. While what is owed waits
    for copies to end, no request begins on it. None begins where cached pages have just gone, for
    vLLM may have found its prompt on them: it looks again in the next schedule.
    """

    @functools.wraps(original)
    def wrapper(self: Any, request: Any, num_new_tokens: int, *args: Any, **kwargs: Any) -> Any:
        pool = self.block_pool
        try:
            giving = pool.giving
        except AttributeError:  # vLLM's own pool
            return original(self, request, num_new_tokens, *args, **kwargs)
        weights, num_evicted = giving.weights, pool.num_evicted_pages
        if not weights.is_active and not weights.activate():
            return None
        if giving.owed_pages and not giving.pay():
            return None
        most_blocks = (num_new_tokens + kwargs.get("num_lookahead_tokens", 0)) * pool.num_groups
        if most_blocks < pool.get_num_free_blocks() and request.num_computed_tokens:
            blocks = original(self, request, num_new_tokens, *args, **kwargs)
            if blocks is not None:
                return blocks
        if not request.num_computed_tokens:
            is_held_back = giving.is_debt_held or giving.holds_back()
            if is_held_back or pool.num_evicted_pages != num_evicted:
                return None
        coordinator = self.coordinator
        coordinator.get_num_blocks_to_allocate = _promised(self, request, kwargs)
        # A connector loads what lies in a window, and has looked for nothing in front of it.
        num_loaded_tokens = kwargs.get("num_external_computed_tokens", 0)
        pool.frees_late = not num_loaded_tokens
        try:
            blocks = original(self, request, num_new_tokens, *args, **kwargs)
        finally:
            pool.frees_late = True
            del coordinator.get_num_blocks_to_allocate
        if num_loaded_tokens and blocks is not None and (copies := pool.engine.port.copies):
            copies.loads(num_loaded_tokens)
        return blocks

    return wrapper


def _promised(manager: Any, request: Any, options: dict[str, Any]) -> Callable[..., int]:
    """Return what counts the blocks that vLLM needs for `request`, and has them promised.

    Those that vLLM leaves to other requests are promised as well. What is not needed after all goes
    back at the end of the schedule.
    """
    count, pool = manager.coordinator.get_num_blocks_to_allocate, manager.block_pool
    num_kept_blocks: int = options.get("reserved_blocks", 0)
    watermark_blocks: int = getattr(manager, "watermark_blocks", 0)  # from 0.24 on
    if watermark_blocks and options.get("has_scheduled_reqs", True):
        from vllm.v1.request import RequestStatus

        if request.status in {RequestStatus.WAITING, RequestStatus.PREEMPTED}:
            num_kept_blocks += watermark_blocks

    def count_and_promise(*args: Any, **kwargs: Any) -> int:
        num_blocks: int = count(*args, **kwargs)
        # With more blocks than there are, vLLM's mamba layers put a request off to the next step.
        if num_blocks <= pool.num_gpu_blocks:
            pool.promise_blocks(num_blocks + num_kept_blocks)
        return num_blocks

    return count_and_promise


def scheduler_schedule(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `Scheduler.schedule`: the orders ride on its output."""

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        pool = self.kv_cache_manager.block_pool
        try:
            engine: VllmEngine = pool.engine
        except AttributeError:  # vLLM's own pool
            return original(self, *args, **kwargs)
        port = engine.port
        if port.left is None:
            output = original(self, *args, **kwargs)
        else:
            with setting(left_behind, port.left):
                output = original(self, *args, **kwargs)
        if port.copies is not None:
            port.copies.begin(output.kv_connector_metadata)
        if (orders := engine.end_schedule()) is not None:
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
        if not num_skipped or not getattr(self.block_pool, "frees_late", False):
            return num_skipped
        return num_skipped - MAX_TILE_TOKENS if num_skipped > MAX_TILE_TOKENS else 0

    return wrapper
