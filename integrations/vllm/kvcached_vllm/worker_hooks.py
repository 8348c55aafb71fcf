"""What takes the place of vLLM's worker methods; each gets the original and returns a wrapper."""

import functools
import sys
from collections.abc import Callable
from contextlib import nullcontext
from contextvars import ContextVar
from typing import Any

from kvcached_core.config import CUDA, HOST, read_config
from kvcached_core.engine.leaving import close_with
from kvcached_core.engine.placing import virtual_bytes
from kvcached_core.memory.devices import Device
from kvcached_core.memory.model_bytes import OTHER_BYTES
from kvcached_core.memory.rank import RankMemory
from kvcached_core.memory.torch_device import find_device, make_backend, make_memory
from kvcached_patches.around import around, around_ours, setting
from kvcached_vllm.elastic_weights import (
    copy_weights,
    enter_weights,
    leave_weights,
    loading,
    move_buffers,
    own_bytes,
    yields_weights,
)
from kvcached_vllm.inline_scales import mark_layers
from kvcached_vllm.layer_waits import WALKS, let_layers_wait, walking
from kvcached_vllm.layout import PLACEMENT, plane_layout, sparse_config, tensor_planes
from kvcached_vllm.obstacles import can_serve
from kvcached_vllm.open_copies import copied_ids
from kvcached_vllm.sleeping import all_or_none, mapped_only
from kvcached_vllm.startup import startup
from kvcached_vllm.transfer_hooks import dense_plan
from kvcached_vllm.weights import static_bytes
from kvcached_vllm.worker import block_ids, inner_worker, name_existing_blocks, name_null_block

# Bytes that vLLM is told while it asks whether its KV cache fits: ours is not there yet.
TOKEN_KV_BYTES = 1

_is_served: ContextVar[bool] = ContextVar("kvcached_is_served", default=False)


def device_of(worker: Any) -> Device:
    """Return the device of a worker; vLLM's `collective_rpc` calls this."""
    return find_device(inner_worker(worker).device, read_config())


def granularity_of(worker: Any) -> int:
    """Return the granularity of a worker's device in bytes; `collective_rpc` calls this."""
    return make_backend(inner_worker(worker).device).granularity_bytes


@around
def worker_init_device(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    """Wrap `Worker.init_device`: `request_memory` inside must know whether we serve."""
    with setting(_is_served, can_serve(self.vllm_config)):
        original(self, *args, **kwargs)


@around
def request_memory(
    original: Any, init_snapshot: Any, cache_config: Any, *args: Any, **kwargs: Any
) -> int:
    """Wrap `request_memory`: a share of the device need not be free when an engine starts."""
    if not _is_served.get():
        return original(init_snapshot, cache_config, *args, **kwargs)
    share = int(init_snapshot.total_memory * cache_config.gpu_memory_utilization)
    return min(share, init_snapshot.free_memory)


@around
def worker_load_model(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    """Wrap `Worker.load_model`: neighbours make room for the weights, which may become ours.

    On a host weights that stay are not counted.
    """
    is_served = can_serve(self.vllm_config)
    is_yielding = is_served and yields_weights(self.vllm_config)
    if is_yielding or (is_served and self.device.type == CUDA):
        model, size = self.vllm_config.model_config.model, static_bytes(self.vllm_config)
        self.kvcached_arrival = startup.arrive(device_of(self), model, size, may_yield=is_yielding)
        self.kvcached_end_arrival = close_with(self, self.kvcached_arrival.close)
    try:
        with loading(self) if is_yielding else nullcontext():
            original(self, *args, **kwargs)
    except BaseException:
        _end_arrival(self)
        raise
    if hasattr(self, "kvcached_arrival"):
        self.kvcached_arrival.shrink(OTHER_BYTES if self.device.type == CUDA else own_bytes(self))


def _end_arrival(worker: Any) -> None:
    if worker.__dict__.pop("kvcached_arrival", None) is not None:
        worker.kvcached_end_arrival()


@around
def worker_initialize_from_config(
    original: Any, self: Any, kv_cache_config: Any, *args: Any, **kwargs: Any
) -> None:
    """Wrap `Worker.initialize_from_config`: vLLM allocates, on our addresses."""
    placement = getattr(kv_cache_config, PLACEMENT, None)
    if placement is not None:
        enter_weights(self, placement.seat)
    _end_arrival(self)
    if placement is None:
        original(self, kv_cache_config, *args, **kwargs)
        return
    from kvcached_core.memory.zeros import zeros_from  # it imports torch

    layout = plane_layout(kv_cache_config)
    memory = make_memory(placement, self.device)
    memory.is_warming_up = True
    startup.logger.info("kvcached: %s", memory.addresses)
    planes = None if layout.is_one_allocation else tensor_planes(layout, placement.geometry)
    try:
        with (
            zeros_from(memory.arena, planes),
            setting(dense_plan, (kv_cache_config, layout)),
        ):
            original(self, sparse_config(kv_cache_config, layout, placement), *args, **kwargs)
    except BaseException:
        memory.close()
        raise
    # One process may be worker and engine core: what vLLM reports stays the number of blocks.
    self.cache_config.num_gpu_blocks = kv_cache_config.num_blocks
    mark_layers(self, memory)
    self.kvcached, self.kvcached_close = memory, close_with(self, memory.close)


def worker_execute_model(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `Worker.execute_model`: map before it, unmap behind it."""
    is_debugging = read_config().debug

    @functools.wraps(original)
    def wrapper(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        memory: RankMemory | None = getattr(self, "kvcached", None)
        if memory is None:
            return original(self, scheduler_output, *args, **kwargs)
        orders = getattr(scheduler_output, "kvcached_orders", None)
        if orders is not None:
            memory.before_step(orders)
        metadata = scheduler_output.kv_connector_metadata
        if metadata is not None and metadata.load_jobs:
            # A load runs on a stream of its own, which in some releases waits for no other.
            memory.backend.synchronize()
        if memory.is_warming_up:
            name_existing_blocks(scheduler_output, memory)
            memory.map_for_warm_up(block_ids(scheduler_output))
        elif is_debugging:
            memory.check_blocks(block_ids(scheduler_output))
            memory.check_blocks(copied_ids(metadata))
        walks = getattr(self, WALKS, None)
        if walks is None or not walks.is_due:
            output = original(self, scheduler_output, *args, **kwargs)
        else:
            with walking(self, walks, scheduler_output):
                output = original(self, scheduler_output, *args, **kwargs)
        if orders is not None:
            memory.after_step(orders)
        return output

    return wrapper


@around_ours
def worker_execute_dummy_batch(call: Any, _memory: RankMemory, self: Any) -> None:
    """Wrap `Worker.execute_dummy_batch`: a step without requests reads the null block alone.

    Some releases leave the blocks of past requests in what a graph reads then. The next step with
    requests writes these tables anew.
    """
    name_null_block(self.model_runner)
    call()


@around_ours
def worker_warm_up(call: Any, memory: RankMemory, self: Any) -> Any:
    """Wrap `compile_or_warm_up_model`: steps inside run on made-up blocks, and are captured."""
    move_buffers(self)
    result = call()
    memory.end_warm_up()
    copy_weights(self)
    let_layers_wait(self)
    return result


@around_ours
def worker_sleep(call: Any, memory: RankMemory, _self: Any) -> None:
    """Wrap `Worker.sleep`: our pages are gone before vLLM looks what it freed.

    vLLM asserts that the device has more free memory afterwards. On a shared device a neighbour may
    have taken it meanwhile, which is what sleeping is for.
    """
    memory.keeper.wait()
    try:
        call()
    except AssertionError as error:
        if "increased after sleeping" not in str(error):
            raise
        startup.logger.info("kvcached: a neighbour took more memory than this engine's sleep freed")


@around_ours
def worker_wake_up(call: Any, memory: RankMemory, self: Any) -> None:
    """Wrap `Worker.wake_up`: all of it or none, and what it zeroes must be mapped."""
    with all_or_none(), mapped_only(self.model_runner, memory):
        call()


@around_ours
def worker_shutdown(call: Any, _memory: RankMemory, self: Any) -> None:
    """Wrap `Worker.shutdown`: give the memory back when nothing runs on it any more."""
    call()
    self.kvcached = None
    leave_weights(self)
    self.kvcached_close()


@around
def worker_determine_available_memory(original: Any, self: Any, *args: Any, **kwargs: Any) -> int:
    """Wrap `Worker.determine_available_memory`: the answer is the virtual size.

    With a size given, vLLM only runs its profile, and does not compare a neighbour's memory of
    before and after. A size that the user gave is kept as far as the limit allows.
    """
    if not can_serve(self.vllm_config):
        return original(self, *args, **kwargs)
    self.cache_config.kv_cache_memory_bytes = _size_bytes(self)
    return original(self, *args, **kwargs)


def _size_bytes(worker: Any) -> int:
    config, device = read_config(), device_of(worker)
    num_ranks = worker.parallel_config.world_size if device.kind == HOST else 1
    size = virtual_bytes(config, device.capacity_bytes(config), num_ranks)
    return min(worker.cache_config.kv_cache_memory_bytes or size, size)


@around
def cpu_worker_init(original: Any, self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
    """Wrap `CPUWorker.__init__`: it must not compare a share of the memory with what is free."""
    if vllm_config.cache_config.kv_cache_memory_bytes is None and can_serve(vllm_config):
        vllm_config.cache_config.kv_cache_memory_bytes = sys.maxsize  # until it is determined
    original(self, vllm_config, *args, **kwargs)


@around
def cpu_worker_determine_available_memory(
    original: Any, self: Any, *args: Any, **kwargs: Any
) -> int:
    """Wrap `CPUWorker.determine_available_memory`: the answer is the virtual size."""
    if not can_serve(self.vllm_config):
        return original(self, *args, **kwargs)
    size = _size_bytes(self)
    self.cache_config.kv_cache_memory_bytes = TOKEN_KV_BYTES
    try:
        original(self, *args, **kwargs)
    finally:
        self.cache_config.kv_cache_memory_bytes = size
    return size
