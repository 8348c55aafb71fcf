"""A worker's side: the memory under its KV cache, and the steps that use it."""

from collections.abc import Iterable, Iterator
from typing import Any

from kvcached_core.memory.orders import PageOrders
from kvcached_core.memory.rank import RankMemory


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
    return (block_id for ids in _id_lists(scheduler_output) for block_id in ids)


def name_existing_blocks(scheduler_output: Any, memory: RankMemory) -> None:
    """Let a step that vLLM warms up on name blocks that exist, where no others can be mapped.

    vLLM makes block ids up, from 1 on, and may name a list twice. See `Geometry.maps_gaps`.
    """
    geometry = memory.arena.geometry
    if geometry.maps_gaps:
        return
    num_blocks = memory.arena.num_pages * geometry.blocks_per_page
    for ids in _id_lists(scheduler_output):
        ids[:] = [
            number if geometry.exists(number) else geometry.block_id(number % num_blocks)
            for number in ids
        ]


def name_null_block(runner: Any) -> None:
    """Have the block tables of a model runner's steps, on its device, name the null block alone."""
    if hasattr(runner, "block_tables"):  # in the second of two model runners
        for table in runner.block_tables.input_block_tables:
            table.zero_()
    else:
        for group in runner.input_batch.block_table.block_tables:
            group.block_table.gpu.zero_()


def _id_lists(scheduler_output: Any) -> Iterator[list[int]]:
    """Yield the lists that a step adds to the workers' block tables, one for each group."""
    new = (request.block_ids for request in scheduler_output.scheduled_new_reqs)
    grown = (ids for ids in scheduler_output.scheduled_cached_reqs.new_block_ids if ids is not None)
    of_requests: Iterable[Iterable[list[int]]] = (*new, *grown)
    return (ids for of_request in of_requests for ids in of_request)
