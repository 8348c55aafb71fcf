"""A `--worker-extension-cls` that writes what torch holds in a vLLM worker to a file, later.

A call that reaches a worker from outside has its weights there first. So this one only sets a
timer; by the time that it is up the weights may be gone.
"""

import threading
from pathlib import Path

from helpers.residue import write
from helpers.seeded import Seeded


class Watched(Seeded):
    """A method that `POST /collective_rpc` reaches; vLLM mixes it into its worker."""

    def write_memory(self, path: str, seconds: str) -> None:
        """Write what this process holds of the device to a file, in so many seconds from now."""
        timer = threading.Timer(float(seconds), write, (Path(path),))
        timer.daemon = True
        timer.start()
