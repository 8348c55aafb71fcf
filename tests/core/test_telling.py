"""What stages of a pipeline tell each other: the first waits for nobody, all hear it in turn."""

import multiprocessing
from pathlib import Path
from typing import Any

import torch
from helpers.waiting import PATIENCE_SECONDS
from torch import distributed

from kvcached_core.engine.telling import MAX_UNREAD, tell_stages

SAID = [[number, -number] for number in range(MAX_UNREAD + 10)]
NUM_UNHEARD = MAX_UNREAD // 2


def run_stage(rank: int, store: Path, has_told: Any, heard: Any) -> None:
    distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    share = tell_stages(rank, [0, 1], distributed.group.WORLD)
    message = torch.tensor([7 - 7 * rank])
    if rank == 0:
        for values in SAID[:NUM_UNHEARD]:
            assert share(values) == values
        has_told.set()
        distributed.send(message, dst=1)  # the engine's own, on the same channel
        for values in SAID[NUM_UNHEARD:]:
            share(values)
    else:
        assert has_told.wait(PATIENCE_SECONDS)  # nobody has listened yet
        distributed.recv(message, src=0)
        heard.put([message.item(), [share([0, 0]) for _ in SAID]])
    distributed.barrier()


def test_the_first_stage_tells_without_waiting_and_the_next_hears_all_in_order(
    tmp_path: Path,
) -> None:
    fork = multiprocessing.get_context("fork")
    has_told, heard = fork.Event(), fork.Queue()
    stages = [
        fork.Process(target=run_stage, args=(rank, tmp_path / "store", has_told, heard))
        for rank in range(2)
    ]
    for stage in stages:
        stage.start()
    assert heard.get(timeout=PATIENCE_SECONDS) == [7, SAID]
    for stage in stages:
        stage.join()
    assert [stage.exitcode for stage in stages] == [0, 0]
