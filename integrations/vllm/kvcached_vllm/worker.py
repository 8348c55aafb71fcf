"""A worker's side: the memory under its KV cache, and the steps that use it."""

from collections.abc import Iterable, Iterator
from typing import Any

from kvcached_core.memory.orders import PageOrders


def carry_out(worker: Any, orders: PageOrders | None, wait: bool) -> None:  # noqa: FBT001  in a call by name and place
    """See `EnginePort.carry_out`: vLLM's `collective_rpc` calls this in each worker."""
    memory = inner_worker(worker).kvcached
    if orders is not None:
        memory.apply(orders)
    if wait:
        memory.keeper.wait()


def inner_worker(worker: Any) -> Any:
    """Return the worker inside vLLM's wrapper, which is what `collective_rpc` hands out."""
    return getattr(worker, "worker", worker)


def block_ids(scheduler_output: Any) -> Iterator[int]:
    """Yield the ids of the blocks that a step adds to the workers' block tables."""
    new = (request.block_ids for request in scheduler_output.scheduled_new_reqs)
    grown = (ids for ids in scheduler_output.scheduled_cached_reqs.new_block_ids if ids is not None)
    groups: Iterable[Iterable[Iterable[int]]] = (*new, *grown)
    return (block_id for of_request in groups for ids in of_request for block_id in ids)
