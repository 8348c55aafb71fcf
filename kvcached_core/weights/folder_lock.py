"""One lock for all that is changed in a folder of copies, over all processes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvcached_core.errors import HostCopyError
from kvcached_core.ledger.lock import FileLock
from kvcached_core.weights.copies_folder import FLAGS, is_current

LOCK_NAME = "budget.lock"
LOCK_SECONDS = 10.0


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let nobody else change what is in a folder that is there.

    Raises:
        HostCopyError: If it cannot be locked, or somebody has the lock and does not go on.
    """
    path = folder / LOCK_NAME
    while True:
        try:
            fd = os.open(path, FLAGS | os.O_CREAT, 0o600)
        except OSError as error:
            raise HostCopyError(f"{path} cannot be opened: {error.strerror}") from error
        lock = FileLock(fd)
        try:
            if not lock.acquire(LOCK_SECONDS):
                raise HostCopyError(f"{path} is locked by another process that does not go on")
            try:
                if is_current(fd, path):
                    yield
                    return
            finally:
                lock.release()  # closing does not do it while a forked child has it open, too
        finally:
            os.close(fd)
