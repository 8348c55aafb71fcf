"""A worker's side: the memory under its KV cache, and the steps that use it."""

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from kvcached_core.config import read_config
from kvcached_core.memory.orders import PageOrders
from kvcached_core.memory.rank import RankMemory
from kvcached_core.memory.vmm.backend import Backend
from kvcached_vllm.layout import Placement

logger = logging.getLogger("vllm.kvcached")


class WorkerMemory(RankMemory):
    """The KV memory of one rank, and what vLLM's steps need of it.

    Args:
        placement: Where it lies.
        backend: Where it comes from.
        current_stream: Returns the stream that the engine's steps are launched on.
    """

    def __init__(
        self,
        placement: Placement,
        backend: Backend,
        current_stream: Callable[[], int] = lambda: 0,
    ) -> None:
        self.debug = read_config().debug
        self.is_warming_up = True
        super().__init__(
            placement.geometry, placement.num_pages, placement.seat, backend, current_stream
        )
        logger.info("kvcached: %s", self.addresses)

    def check_step(self, scheduler_output: Any) -> None:
        """Refuse a step that names a block which is not mapped.

        Raises:
            UnmappedBlockError: With the block ids and their pages.
        """
        self.check_blocks(_block_ids(scheduler_output))

    def map_for_warm_up(self, scheduler_output: Any) -> None:
        """Map what a warm-up step touches: the engine made its block ids up."""
        touched = {
            page
            for block_id in _block_ids(scheduler_output)
            for page in self.arena.geometry.pages_touched(block_id)
            if page < self.arena.num_pages and not self.arena.is_resident(page)
        }
        self.reserve_or_wait(len(touched))
        self.carry_out(PageOrders(map_pages=sorted(touched), num_used_pages=1))

    def end_warm_up(self) -> None:
        """Give back what warm-up steps used."""
        self.is_warming_up = False
        pages = [page for page in self.arena.resident_pages if page != 0]
        self.carry_out(PageOrders(unmap_pages=pages, num_used_pages=1))


def apply_orders(worker: Any, orders: PageOrders) -> None:
    """Carry out orders between two steps; vLLM's `collective_rpc` calls this in each worker."""
    memory_of(worker).apply(orders)


def settle_orders(worker: Any) -> None:
    """Return when all orders are carried out; vLLM's `collective_rpc` calls this."""
    memory_of(worker).keeper.wait()


def resident_pages(worker: Any) -> list[int]:
    """Return the pages that a rank has mapped when all its orders are carried out."""
    settle_orders(worker)
    return sorted(memory_of(worker).arena.resident_pages)


def memory_of(worker: Any) -> WorkerMemory:
    """Return the memory of a worker."""
    memory: WorkerMemory = inner_worker(worker).kvcached
    return memory


def inner_worker(worker: Any) -> Any:
    """Return the worker inside vLLM's wrapper, which is what `collective_rpc` hands out."""
    return getattr(worker, "worker", worker)


def _block_ids(scheduler_output: Any) -> Iterator[int]:
    """Yield the ids of the blocks that a step adds to the workers' block tables."""
    new = (request.block_ids for request in scheduler_output.scheduled_new_reqs)
    grown = (ids for ids in scheduler_output.scheduled_cached_reqs.new_block_ids if ids is not None)
    groups: Iterable[Iterable[Iterable[int]]] = (*new, *grown)
    return (block_id for of_request in groups for ids in of_request for block_id in ids)
