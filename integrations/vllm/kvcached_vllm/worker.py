"""A worker's side: the arena under its KV cache, and the orders it carries out."""

import functools
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from kvcached_core.arena import Arena
from kvcached_core.config import read_config
from kvcached_core.errors import UnmappedBlockError, UnsupportedEngineError
from kvcached_core.ledger import Ledger
from kvcached_core.page_pool import PageOrders
from kvcached_core.vmm.host import HostBackend
from kvcached_core.vmm.metered import MeteredBackend
from kvcached_vllm import startup
from kvcached_vllm.layout import PLACEMENT, Placement, plane_layout, sparse_config

logger = logging.getLogger("vllm.kvcached")

# Bytes that vLLM is told while it asks whether its KV cache fits: ours is not there yet.
TOKEN_KV_BYTES = 1


class WorkerMemory:
    """The KV memory of one rank."""

    def __init__(self, placement: Placement) -> None:
        self.debug = read_config().debug
        self.placement = placement
        self.is_warming_up = True
        self.ledger = Ledger(Path(placement.ledger_path))
        self.ledger.join(placement.row)
        self.backend = MeteredBackend(HostBackend())
        self.arena = Arena(self.backend, placement.geometry, placement.num_pages)
        logger.info(
            "kvcached: process %d has addresses %#x to %#x",
            os.getpid(),
            self.arena.address,
            self.arena.address + self.arena.num_bytes,
        )
        self.carry_out(PageOrders(map_pages=[0], num_used_pages=1))

    def carry_out(self, orders: PageOrders) -> None:
        """Map and unmap at once: only between steps."""
        self.before_step(orders)
        self.after_step(orders)

    def before_step(self, orders: PageOrders) -> None:
        """Map what the step needs; a page that is mapped already stays as it is."""
        pages = [page for page in orders.map_pages if not self.arena.is_resident(page)]
        self.arena.map(pages)
        self._settle(orders, num_mapped=len(pages))

    def after_step(self, orders: PageOrders) -> None:
        """Unmap what no step reads any more."""
        pages = [page for page in orders.unmap_pages if self.arena.is_resident(page)]
        if pages:
            self.arena.unmap(pages)
            self._settle(orders, num_unmapped=len(pages))

    def check_step(self, scheduler_output: Any) -> None:
        """Refuse a step that names a block which is not mapped.

        Raises:
            UnmappedBlockError: With the block ids and their pages.
        """
        geometry = self.arena.geometry
        wrong = [
            block_id
            for block_id in _block_ids(scheduler_output)
            if not geometry.exists(block_id)
            or not self.arena.is_resident(geometry.page_of(block_id))
        ]
        if wrong:
            pages = sorted({geometry.page_of(block_id) for block_id in wrong})
            raise UnmappedBlockError(
                f"a step uses unmapped blocks {wrong[:8]} of pages {pages[:8]}"
            )

    def map_for_warm_up(self, scheduler_output: Any) -> None:
        """Map what a warm-up step touches: the engine made its block ids up."""
        touched = {
            page
            for block_id in _block_ids(scheduler_output)
            for page in self.arena.geometry.pages_touched(block_id)
            if page < self.arena.num_pages and not self.arena.is_resident(page)
        }
        page_bytes = self.arena.geometry.page_bytes
        self.ledger.reserve(self.placement.row, len(touched) * page_bytes, page_bytes)
        self.carry_out(PageOrders(map_pages=sorted(touched), num_used_pages=1))

    def end_warm_up(self) -> None:
        """Give back what warm-up steps used."""
        self.is_warming_up = False
        pages = [page for page in self.arena.resident_pages if page != 0]
        self.carry_out(PageOrders(unmap_pages=pages, num_used_pages=1))

    def close(self) -> None:
        """Give everything back."""
        self.carry_out(PageOrders(unmap_pages=self.arena.resident_pages))
        self.arena.close()
        self.ledger.close()

    def _settle(self, orders: PageOrders, *, num_mapped: int = 0, num_unmapped: int = 0) -> None:
        page_bytes = self.arena.geometry.page_bytes
        self.ledger.settle(
            self.placement.row,
            mapped_bytes=num_mapped * page_bytes,
            unmapped_bytes=num_unmapped * page_bytes,
            used_bytes=orders.num_used_pages * page_bytes,
            cached_bytes=orders.num_cached_pages * page_bytes,
        )


def apply_orders(worker: Any, orders: PageOrders) -> None:
    """Carry out orders between two steps; vLLM's `collective_rpc` calls this in each worker."""
    _memory(getattr(worker, "worker", worker)).carry_out(orders)


def _memory(worker: Any) -> WorkerMemory:
    memory: WorkerMemory = worker.kvcached
    return memory


def _block_ids(scheduler_output: Any) -> Iterator[int]:
    """Yield the ids of the blocks that a step adds to the workers' block tables."""
    new = (request.block_ids for request in scheduler_output.scheduled_new_reqs)
    grown = (ids for ids in scheduler_output.scheduled_cached_reqs.new_block_ids if ids is not None)
    groups: Iterable[Iterable[Iterable[int]]] = (*new, *grown)
    return (block_id for of_request in groups for ids in of_request for block_id in ids)


def worker_initialize_from_config(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap `Worker.initialize_from_config`: vLLM allocates, on our addresses."""

    @functools.wraps(original)
    def wrapper(self: Any, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        placement: Placement | None = getattr(kv_cache_config, PLACEMENT, None)
        if placement is None:
            original(self, kv_cache_config, *args, **kwargs)
            return
        from kvcached_vllm.zeros import ZerosFromArena

        layout = plane_layout(kv_cache_config)
        memory = WorkerMemory(placement)
        arena = memory.arena
        if layout.is_one_allocation:
            tensors = [arena.tensor()]
        else:
            tensors = [arena.plane_tensor(plane) for plane in range(layout.num_planes)]
        with ZerosFromArena(tensors) as zeros:
            original(self, sparse_config(kv_cache_config, layout, placement), *args, **kwargs)
        if zeros.num_left:
            raise UnsupportedEngineError(
                f"vLLM allocated {len(tensors) - zeros.num_left} KV tensors, not {len(tensors)}"
            )
        # One process may be worker and engine core: what vLLM reports stays the number of blocks.
        self.cache_config.num_gpu_blocks = kv_cache_config.num_blocks
        self.kvcached = memory

    return wrapper


def worker_execute_model(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `Worker.execute_model`: map before it, unmap after it."""

    @functools.wraps(original)
    def wrapper(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        memory: WorkerMemory | None = getattr(self, "kvcached", None)
        if memory is None:
            return original(self, scheduler_output, *args, **kwargs)
        orders: PageOrders | None = getattr(scheduler_output, "kvcached_orders", None)
        if orders is not None:
            memory.before_step(orders)
        elif memory.is_warming_up:
            memory.map_for_warm_up(scheduler_output)
        if memory.debug:
            memory.check_step(scheduler_output)
        output = original(self, scheduler_output, *args, **kwargs)
        if orders is not None:
            memory.after_step(orders)
        return output

    return wrapper


def worker_warm_up(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `compile_or_warm_up_model`: steps inside run on made-up blocks."""

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        memory: WorkerMemory | None = getattr(self, "kvcached", None)
        if memory is not None:
            memory.end_warm_up()
        return result

    return wrapper


def worker_shutdown(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap `Worker.shutdown`: give the memory back when nothing runs on it any more."""

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        memory: WorkerMemory | None = self.__dict__.pop("kvcached", None)
        if memory is not None:
            memory.close()

    return wrapper


def cpu_worker_init(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap `CPUWorker.__init__`: it must not compare a share of the memory with what is free."""

    @functools.wraps(original)
    def wrapper(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        is_unset = vllm_config.cache_config.kv_cache_memory_bytes is None
        if is_unset and startup.can_serve(vllm_config):
            vllm_config.cache_config.kv_cache_memory_bytes = read_config().virtual_bytes
        original(self, vllm_config, *args, **kwargs)

    return wrapper


def cpu_worker_determine_available_memory(original: Callable[..., int]) -> Callable[..., int]:
    """Wrap `CPUWorker.determine_available_memory`: the answer is the virtual size.

    A size that the user gave with `--kv-cache-memory-bytes` is kept as far as the limit allows.
    """

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> int:
        if not startup.can_serve(self.vllm_config):
            return original(self, *args, **kwargs)
        virtual_bytes: int = min(
            self.cache_config.kv_cache_memory_bytes, read_config().virtual_bytes
        )
        self.cache_config.kv_cache_memory_bytes = TOKEN_KV_BYTES
        try:
            original(self, *args, **kwargs)
        finally:
            self.cache_config.kv_cache_memory_bytes = virtual_bytes
        return virtual_bytes

    return wrapper
