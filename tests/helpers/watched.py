"""A `--worker-extension-cls` with calls that reach a vLLM worker: what a benchmark looks at there.

A call that reaches a worker from outside has its weights there first. So a report is only put off;
by the time that it is written the weights may be gone.
"""

import os
import threading
from pathlib import Path

import torch

from helpers.residue import write
from helpers.seeded import Seeded
from kvcached_core.weights import rank

# Set, torch notes from the worker's beginning on where each block was allocated.
HISTORY = "MEMORY_HISTORY"

if HISTORY in os.environ and torch.cuda.is_available():
    torch.cuda.memory._record_memory_history("state", context="state", stacks="python")


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

    def set_copy_bytes(self, num_bytes: str) -> None:
        """Let weights come back in copies of up to so many bytes."""
        rank.MAX_COPY_BYTES = int(num_bytes)
