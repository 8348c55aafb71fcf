"""One block of the only request of an engine in this process is made wrong, in the middle of it."""

import itertools
from typing import Any

import torch

STEPS_BEFORE = 5

_numbers = itertools.count()


def stepped(llm: Any, asked: Any, sampling: Any, group: int | None) -> list[int]:
    """Answer step by step; after a few, negate the first block that the request has in a group."""
    engine, request_id = llm.llm_engine, f"stepped-{next(_numbers)}"
    engine.add_request(request_id, asked, sampling)
    for number in itertools.count(1):
        for output in engine.step():
            if output.finished:
                return list(output.outputs[0].token_ids)
        if number == STEPS_BEFORE and group is not None:
            _negate_first_block(engine.engine_core.engine_core, group)
    raise AssertionError


def _negate_first_block(core: Any, group: int) -> None:
    """Write over the first block that the only request has in a group, in all planes."""
    coordinator = core.scheduler.kv_cache_manager.coordinator
    (blocks,) = coordinator.single_type_managers[group].req_to_blocks.values()
    arena = core.model_executor.driver_worker.worker.kvcached.arena
    block_bytes = arena.geometry.block_bytes
    start = blocks[0].block_id * block_bytes
    for plane in range(arena.geometry.num_planes):
        arena.plane_tensor(plane)[start : start + block_bytes].view(torch.float32).neg_()
