"""Leaving nothing behind: the last process of a user's last engine removes the ledger files."""

import contextlib
import os
from multiprocessing.util import Finalize
from pathlib import Path

from kvcached_core.errors import LedgerError
from kvcached_core.ledger import sweep

# Behind everything else that ends with a process: it waits for its children before this.
_LAST = -1000

_registered: set[tuple[int, Path]] = set()


def sweep_at_exit(directory: Path) -> None:
    """Remove the ledgers in `directory` that nobody uses when this process ends.

    Each process of an engine calls it, once or often: whichever of them ends last finds no row
    alive, also where another one was killed. A child of a plain fork does nothing.
    """
    key = os.getpid(), directory
    if key not in _registered:
        _registered.add(key)
        Finalize(None, _sweep, args=(directory,), exitpriority=_LAST)


def _sweep(directory: Path) -> None:
    with contextlib.suppress(LedgerError, OSError):
        sweep(directory)
