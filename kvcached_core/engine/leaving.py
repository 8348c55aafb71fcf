"""Leaving nothing behind: the last process of a user's last engine removes the ledger files.

And each that ends removes what engines that were killed left of host memory.
"""

import contextlib
import os
import time
from multiprocessing.util import Finalize
from pathlib import Path

from kvcached_core.errors import LedgerError
from kvcached_core.ledger.ledger import Ledger, sweep
from kvcached_core.weights.copies_folder import remove_leftovers

# Behind everything else that ends with a process: it waits for its children before this.
_LAST = -1000

# How long a process that ends waits for what is left of a killed engine: its workers hold its rows
# until the kernel is done with them.
_DYING_SECONDS, _LOOK_SECONDS = 1.0, 0.02

_registered: set[tuple[int, Path]] = set()


def sweep_at_exit(directory: Path, copies: Path) -> None:
    """Remove the ledgers in `directory` that nobody uses when this process ends.

    And what killed engines left of host memory, by their claims in the folder `copies`.

    Each process of an engine calls it, once or often: whichever of them ends last finds no row
    alive, also where another one was killed. A child of a plain fork does nothing.
    """
    key = os.getpid(), directory
    if key not in _registered:
        _registered.add(key)
        Finalize(None, _sweep, args=(directory, copies), exitpriority=_LAST)


def _sweep(directory: Path, copies: Path) -> None:
    deadline = time.monotonic() + _DYING_SECONDS
    with contextlib.suppress(LedgerError, OSError):
        sweep(directory)
        while _has_orphans(directory) and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)
            sweep(directory)
    with contextlib.suppress(OSError):
        remove_leftovers(copies)


def _has_orphans(directory: Path) -> bool:
    """Return whether a row is held although who registered it does not run here any more."""
    for path in directory.glob("*.ledger"):
        with Ledger(path) as ledger:
            pids = [instance.pid for instance in ledger.view().instances]
        if any(not Path(f"/proc/{pid}").exists() for pid in pids):
            return True
    return False
