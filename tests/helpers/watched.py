"""A `--worker-extension-cls` with calls that reach a vLLM worker: what a benchmark looks at there.

A call that reaches a worker from outside has its weights there first. So a report is only put off;
by the time that it is written the weights may be gone.
"""

import gc
import json
import os
import threading
from pathlib import Path

import torch

from helpers.residue import write
from helpers.seeded import Seeded
from kvcached_core.weights import arriving, image, scratch
from kvcached_core.weights.annex import Annex
from kvcached_core.weights.scratch import Scratch

# Set, torch notes from the worker's beginning on where each block was allocated.
HISTORY = "MEMORY_HISTORY"
STACK_BYTES = 1024  # of a thread, where no kernel needs more

if HISTORY in os.environ and torch.cuda.is_available():
    torch.cuda.memory._record_memory_history("state", context="state", stacks="python")


# Set, smaller buffers go with the weights, too.
LEAST = "LEAST_SCRATCH_BYTES"

if LEAST in os.environ:
    scratch.LEAST_SCRATCH_BYTES = int(os.environ[LEAST])


class Watched(Seeded):
    """Methods that `POST /collective_rpc` reaches; vLLM mixes it into its worker."""

    def write_memory(self, path: str, seconds: str) -> None:
        """Write what this process holds of the device to a file, in so many seconds from now."""
        timer = threading.Timer(float(seconds), write, (Path(path),))
        timer.daemon = True
        timer.start()

    def end_history(self) -> None:
        """Note no further allocations: that takes time. What was noted stays."""
        if torch.cuda.is_available():
            torch.cuda.memory._record_memory_history(None)

    def spoil_annex(self) -> None:
        """Write zeros over one unit of what the annex kept the last time that it went."""
        for annex in (one for one in gc.get_objects() if issubclass(type(one), Annex)):
            for span in annex._spans.values():
                for first, last, _ in span.kept if type(span.tenant) is Scratch else ():
                    annex._units((span, first, last))[0] = 0

    def lower_stack(self, path: str) -> None:
        """Set the limit of a thread's stack to what it is; write what that gives back of memory.

        A kernel that needed more has raised it, for all threads that the device can run, for good.
        """
        from cuda.bindings import driver

        limit = driver.CUlimit.CU_LIMIT_STACK_SIZE
        torch.cuda.synchronize()
        before, (_, stack_bytes) = torch.cuda.mem_get_info()[0], driver.cuCtxGetLimit(limit)
        code = driver.cuCtxSetLimit(limit, STACK_BYTES)
        freed = torch.cuda.mem_get_info()[0] - before
        found = {"stack_bytes": int(stack_bytes), "freed_bytes": freed, "code": str(code)}
        Path(path).write_text(json.dumps(found))

    def set_copy_bytes(self, num_bytes: str) -> None:
        """Let weights come back in copies of up to so many bytes."""
        image.MAX_COPY_BYTES = int(num_bytes)

    def set_ahead_bytes(self, num_bytes: str) -> None:
        """Let the device be told of so many bytes of weights ahead of what it has copied."""
        arriving.AHEAD_BYTES = int(num_bytes)
