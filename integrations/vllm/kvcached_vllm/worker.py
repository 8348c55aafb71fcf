"""A worker's side: the arena under its KV cache, and the orders it carries out."""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from kvcached_core.arena import Arena
from kvcached_core.config import read_config
from kvcached_core.errors import BackendError, LedgerError, OutOfMemoryError, UnmappedBlockError
from kvcached_core.ledger import Ledger
from kvcached_core.page_keeper import PageChanges, PageKeeper
from kvcached_core.page_pool import PageOrders
from kvcached_core.pressure import ask_peers, wake
from kvcached_core.vmm.backend import Backend
from kvcached_core.vmm.metered import MeteredBackend
from kvcached_vllm.layout import Placement

logger = logging.getLogger("vllm.kvcached")

# How long a step waits for memory that was promised and that somebody outside the ledger took.
PATIENCE_SECONDS = 30.0
RETRY_SECONDS = 0.01


class WorkerMemory:
    """The KV memory of one rank.

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
        self.seat = placement.seat
        self.ledger = Ledger(Path(self.seat.ledger_path))
        self.ledger.join(self.seat.row)
        self.backend = MeteredBackend(backend)
        self.arena = Arena(self.backend, placement.geometry, placement.num_pages)
        self._current_stream = current_stream
        self._counts = (0, 0)
        self.keeper = PageKeeper(self.arena, self._report)
        logger.info(
            "kvcached: process %d has addresses %#x to %#x",
            os.getpid(),
            self.arena.address,
            self.arena.address + self.arena.num_bytes,
        )
        self.carry_out(PageOrders(map_pages=[0], num_used_pages=1))

    def carry_out(self, orders: PageOrders) -> None:
        """Map and unmap, and return when it is done: only between steps."""
        self.before_step(orders)
        self.after_step(orders)
        self.keeper.wait()

    def before_step(self, orders: PageOrders) -> None:
        """Map what the step needs, and begin with what the next ones will need."""
        counts = orders.num_used_pages, orders.num_cached_pages
        has_new_counts, self._counts = counts != self._counts, counts
        if orders.map_pages or orders.ready_pages:
            self._map_now(orders.map_pages + orders.ready_pages)
        if orders.spare_pages:
            self.keeper.map_soon(orders.spare_pages)
        if has_new_counts and not orders.map_pages:
            self._report(PageChanges())

    def after_step(self, orders: PageOrders) -> None:
        """Let go of what no step behind this one reads: it is unmapped when this one is done."""
        if orders.unmap_pages:
            fence = self.backend.fence(self._current_stream())
            self.keeper.unmap_behind(orders.unmap_pages, fence)

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
        self.ledger.reserve(self.seat.row, len(touched) * page_bytes, page_bytes)
        self.carry_out(PageOrders(map_pages=sorted(touched), num_used_pages=1))

    def end_warm_up(self) -> None:
        """Give back what warm-up steps used."""
        self.is_warming_up = False
        pages = [page for page in self.arena.resident_pages if page != 0]
        self.carry_out(PageOrders(unmap_pages=pages, num_used_pages=1))

    def close(self) -> None:
        """Give everything back."""
        self.keeper.close()
        num_resident = len(self.arena.resident_pages)
        with contextlib.suppress(BackendError):  # a device that failed has nothing to wait for
            self.backend.fence(self._current_stream()).wait()
        self.arena.close()
        self._counts = (0, 0)
        with contextlib.suppress(LedgerError):  # the engine may have left, and with it the row
            self._report(PageChanges(num_unmapped=num_resident))
        self.ledger.close()

    def _map_now(self, pages: list[int]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                self.keeper.map_now(pages, self._current_stream())
            except OutOfMemoryError as error:
                # The step is scheduled and its engine cannot take it back, so it waits.
                if time.monotonic() > deadline:
                    raise
                logger.warning("kvcached: %s; asking the neighbours and trying again", error)
                wanted_bytes = len(pages) * self.arena.geometry.page_bytes
                ask_peers(self.ledger, self.seat.row, wanted_bytes)
                time.sleep(RETRY_SECONDS)
            else:
                return

    def _report(self, changes: PageChanges) -> None:
        page_bytes = self.arena.geometry.page_bytes
        num_used, num_cached = (count * self.seat.num_ranks for count in self._counts)
        waiting = self.ledger.settle(
            self.seat.row,
            mapped_bytes=changes.num_mapped * page_bytes,
            unmapped_bytes=changes.num_unmapped * page_bytes,
            unneeded_bytes=changes.num_spared * page_bytes,
            used_bytes=num_used * page_bytes,
            cached_bytes=num_cached * page_bytes,
        )
        wake(self.ledger, waiting)


def apply_orders(worker: Any, orders: PageOrders) -> None:
    """Carry out orders between two steps; vLLM's `collective_rpc` calls this in each worker."""
    memory = memory_of(worker)
    memory.before_step(orders)
    memory.after_step(orders)


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
