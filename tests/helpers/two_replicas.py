"""Run as a script: two vLLM engines with the same weights; one wakes out of the other; it reports.

Arguments: a model folder, and a JSON object that is not looked at.
"""

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

from two_weights import NUM_PROMPTS, Asked

from helpers.waiting import PATIENCE_SECONDS, await_that
from kvcached_core.ledger.survey import survey
from kvcached_core.weights import importing


def rank_of(worker: Any) -> Any:
    """Return a worker's weights."""
    return getattr(worker, "worker", worker).kvcached_weights.rank


def wait_ready(worker: Any) -> None:
    """Return when replicas find the worker; it waits for theirs however loaded the machine is."""
    importing.ANSWER_SECONDS = PATIENCE_SECONDS
    rank = rank_of(worker)
    await_that(lambda: rank._replicas._exporting is not None)


def spoil_copy(worker: Any) -> None:
    """Let a wake from the host be seen; a call like this has the weights there first."""
    copy = rank_of(worker).copying.copy
    ctypes.memset(copy.page_address(0), 1, copy.num_bytes)


def weights_bytes() -> list[int]:
    """Return what of their weights the engines have on the device, the least first."""
    (device,) = survey(Path(os.environ["KVCACHED_DIR"])).devices
    return sorted(row.weights_bytes for row in device.instances)


def stop_exporting(worker: Any) -> None:
    """Let no replica read the worker's weights."""
    rank_of(worker)._replicas.close()


def main() -> None:
    """Start both, let the first sleep and wake, report one JSON object on the last line."""
    ours, theirs = engines = [Asked(sys.argv[1]) for _ in range(2)]
    for engine in engines:
        engine.llm.collective_rpc(wait_ready)

    def slept() -> list[bool]:
        ours.llm.wake_up()
        return [ours.is_right(number) for number in range(NUM_PROMPTS)]

    report: dict[str, Any] = {"same": ours.expected == theirs.expected}
    ours.llm.collective_rpc(spoil_copy)
    report["awake_bytes"] = weights_bytes()
    ours.llm.sleep(level=1)
    report["asleep_bytes"] = weights_bytes()
    report["from_replica"] = slept()
    report["replica"] = [theirs.is_right(number) for number in range(NUM_PROMPTS)]
    theirs.llm.collective_rpc(stop_exporting)
    ours.llm.sleep(level=1)
    report["from_spoiled_copy"] = slept()
    print(json.dumps(report), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
