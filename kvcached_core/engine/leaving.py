"""Leaving nothing behind: the last process of a user's last engine removes the ledger files.

And each that ends removes what engines that were killed left of host memory. In a process that
goes on, what an engine held goes with the engine, also where its start failed.
"""

import atexit
import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable
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


def close_with(
    owner: object, close: Callable[[], object], *, is_at_exit: bool = False
) -> Callable[[], None]:
    """Have `close` called once: when its owner is gone, or before that by what is returned.

    Args:
        owner: What nobody has any more after an engine, or after a start that failed. An engine in
            its caller's process may have nobody who ends it.
        close: It must not keep the owner. A child of a plain fork does not call it for an owner.
        is_at_exit: Whether the end of the process calls it, too.
    """
    finalizer = weakref.finalize(owner, _close_in_thread, os.getpid(), close)
    finalizer.atexit = False

    def close_now() -> None:
        atexit.unregister(close_now)
        if finalizer.detach() is not None:
            close()

    if is_at_exit:
        atexit.register(close_now)
    return close_now


def _close_in_thread(pid: int, close: Callable[[], object]) -> None:
    # Whoever collects the owner may be in the middle of what closing waits for, such as a lock.
    if os.getpid() == pid:
        threading.Thread(target=close, name="kvcached-close").start()


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
