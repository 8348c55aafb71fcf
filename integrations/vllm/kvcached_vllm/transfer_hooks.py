"""What takes the place of vLLM's functions around copies between the device and the host."""

import functools
from collections.abc import Callable
from contextvars import ContextVar
from importlib.util import find_spec
from typing import Any

from kvcached_core.errors import UnsupportedEngineError
from kvcached_patches.around import OURS, around
from kvcached_vllm.layout import PlaneLayout, connector_config
from kvcached_vllm.left_behind import left_behind

# While a worker allocates: vLLM's own plan, and how it lies.
dense_plan: ContextVar[tuple[Any, PlaneLayout] | None] = ContextVar(
    "kvcached_dense_plan", default=None
)
# A module of the releases that copy nothing of a request which was aborted while it waited.
_LATER_MODULE = "vllm.distributed.kv_transfer.kv_connector.v1.offloading.canonical_mapping"


@around
def ensure_kv_transfer_initialized(original: Any, vllm_config: Any, kv_cache_config: Any) -> None:
    """Wrap `ensure_kv_transfer_initialized`: a connector reads our plan as it would vLLM's.

    Raises:
        UnsupportedEngineError: If it would not copy the bytes that it copies of vLLM's.
    """
    plan = dense_plan.get()
    if plan is None or vllm_config.kv_transfer_config is None:
        original(vllm_config, kv_cache_config)
        return
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.config import (
        build_offloading_config,
    )

    dense, layout = plan
    sparse = connector_config(kv_cache_config, layout)
    expected, found = (
        build_offloading_config(vllm_config, each).worker_kv_bytes_per_block
        for each in (dense, sparse)
    )
    if found != expected:
        raise UnsupportedEngineError(
            f"KV offloading: a block has {found} bytes for the worker and {expected} for the "
            "scheduler; remove --kv-offloading-size"
        )
    original(vllm_config, sparse)


def prefer_cross_layer_blocks(original: property) -> property:
    """Wrap `OffloadingConnector.prefer_cross_layer_blocks`: our memory lies layer by layer."""

    def getter(self: Any) -> bool:
        return False if dense_plan.get() is not None else bool(original.__get__(self))

    return property(getter)


def scheduler_update_from_output(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `Scheduler.update_from_output`: with a step's output come reports of copies."""

    @functools.wraps(original)
    def wrapper(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        result = original(self, scheduler_output, model_runner_output)
        if self.connector is None:
            return result
        engine = getattr(self.kv_cache_manager.block_pool, "engine", None)
        if engine is not None and (copies := engine.port.copies) is not None:
            copies.computed(scheduler_output.total_num_scheduled_tokens)
            transfers = model_runner_output.kv_connector_output
            if transfers is not None and transfers.kv_connector_worker_meta is not None:
                copies.end(transfers.kv_connector_worker_meta)
            copies.count(result)
        return result

    return wrapper


def llm_engine_has_unfinished_requests(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `LLMEngine.has_unfinished_requests`: an engine is not done while its copies are open.

    One in its caller's process has no loop of its own. Who calls steps it on until it is done, and
    so until the pages of its last copies go.
    """

    @functools.wraps(original)
    def wrapper(self: Any) -> Any:
        if unfinished := original(self):
            return unfinished
        core = getattr(self.engine_core, "engine_core", None)  # None in another process
        engine = getattr(core, OURS, None)
        if engine is None or engine.port.copies is None:
            return unfinished
        return engine.port.has_copies_to_end()

    return wrapper


def scheduler_connector_finished(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `Scheduler._connector_finished`: a connector copies no blocks that a request has lost.

    0.26 remembers those that a preempted request had, until it is scheduled again. If it is aborted
    first, they would be copied, though they were freed long ago.
    """
    forgets = find_spec(_LATER_MODULE) is not None

    @functools.wraps(original)
    def wrapper(self: Any, request: Any) -> Any:
        manager = self.kv_cache_manager
        engine = getattr(manager.block_pool, "engine", None)
        if engine is None or engine.port.copies is None:
            return original(self, request)
        is_preempted = request.num_preemptions and not request.num_computed_tokens
        if is_preempted and not forgets:
            self.connector.get_num_new_matched_tokens(request, 0)  # it begins with forgetting them
        result = original(self, request)
        if engine.port.left is not None:
            name = request.request_id
            engine.port.left.forget_left(name, manager.get_block_ids(name))
        return result

    return wrapper


@around
def connector_build_store_jobs(original: Any, self: Any, scheduler_output: Any) -> Any:
    """Wrap `OffloadingConnectorScheduler._build_store_jobs`: store what a request still has."""
    if (left := left_behind.get()) is not None:
        left.before_stores(self, scheduler_output)
    return original(self, scheduler_output)
