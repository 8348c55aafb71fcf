"""Who holds how much host memory of ours, of all processes, against one budget.

Beside the host copies lies a file for each claim, locked as long as its process lives, so that
nothing stays claimed when one is killed. A copy that is finished counts by its size. One that
nobody uses is removed, the oldest first, when a claim needs the room.
"""

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvcached_core.config import PREFIX, Config
from kvcached_core.errors import HostBudgetError, HostCopyError
from kvcached_core.ledger.forks import disown_in_children
from kvcached_core.ledger.lock import FileLock, take_byte
from kvcached_core.memory.host_memory import host_memory
from kvcached_core.units import format_bytes
from kvcached_core.weights.copies_folder import (
    CLAIM,
    FLAGS,
    WHOLE,
    Holder,
    copies_folder,
    is_current,
    read_holders,
    remove_unused,
    sweep,
)

LOCK_NAME = "budget.lock"
LOCK_SECONDS = 10.0

logger = logging.getLogger("kvcached")


class Claim:
    """Host memory that a process holds until `close`, or until it ends.

    A copy claims all that it needs before its first byte. Two that claimed while they are filled
    could each hold a part of the budget, and neither would ever be complete.

    Attributes:
        num_bytes: How much it is.
    """

    def __init__(self, folder: Path, name: str, num_bytes: int, file: str) -> None:
        self.num_bytes = num_bytes
        self._path = folder / f"{os.getpid()}-{time.time_ns()}{CLAIM}"
        self._fd = os.open(self._path, FLAGS | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            take_byte(self._fd, WHOLE)
            words = {"name": name, "num_bytes": num_bytes, "file": file}
            os.pwrite(self._fd, json.dumps(words).encode(), 0)
        except BaseException:
            self.close()
            raise
        disown_in_children(self)

    def close(self) -> None:
        """Give all of it back; a second call does nothing."""
        if self._fd >= 0:
            self._path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1

    def disown(self) -> None:
        """Let go of the claim in a forked child; it stays its parent's."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class HostBudget:
    """What our copies in host memory may take together: `KVCACHED_HOST_BUDGET`.

    Any thread may use it. Processes with another setting share the same claims, and each goes by
    its own.

    Args:
        config: The settings.
        usable_bytes: What this process may use of the host's memory; None looks.

    Attributes:
        folder: Where claims and copies lie; it is made and checked with the first claim.
        budget_bytes: What all claims and copies together may be.
    """

    def __init__(self, config: Config, usable_bytes: int | None = None) -> None:
        usable = host_memory().usable_bytes if usable_bytes is None else usable_bytes
        self.folder = config.copies_dir
        self.budget_bytes = config.host_budget_bytes(usable)

    def claim(self, name: str, num_bytes: int, *, file: str = "") -> Claim:
        """Claim `num_bytes` of host memory.

        Args:
            name: What they are for, for people.
            num_bytes: How many.
            file: The copy in the folder that they are for; it does not count again by its size.

        Raises:
            HostBudgetError: If there is no room, or nowhere to write it down.
            HostCopyError: If the folder cannot be used.
        """
        with self._room_for(name, num_bytes):
            try:
                return Claim(self.folder, name, num_bytes, file)
            except OSError as error:
                raise HostBudgetError(
                    f"{self.folder} has no room to claim {format_bytes(num_bytes)} for {name}: "
                    f"{error.strerror}; free it, or set {PREFIX}WEIGHTS_DIR to another folder",
                    num_bytes,
                    self.budget_bytes,
                ) from error

    @contextmanager
    def _room_for(self, name: str, num_bytes: int) -> Iterator[None]:
        """Make room for so many bytes, and let nobody else claim any meanwhile."""
        with _locked(self.folder):
            sweep(self.folder)
            holders = read_holders(self.folder)
            left = self.budget_bytes - num_bytes - sum(held.num_bytes for held in holders)
            unused = [held for held in holders if not held.is_used]
            if left + sum(held.num_bytes for held in unused) < 0:
                raise self._error(name, num_bytes, [held for held in holders if held.is_used])
            for held in sorted(unused, key=lambda held: held.last_used_ns):
                if left >= 0:
                    break
                if remove_unused(held.path):
                    logger.info("kvcached: removed the host copy of %s, unused", held.name)
                    left += held.num_bytes
            if left < 0:  # somebody began to use one of them
                raise self._error(name, num_bytes, read_holders(self.folder))
            yield

    def _error(self, name: str, num_bytes: int, holders: list[Holder]) -> HostBudgetError:
        shares = [f"{held.name} {format_bytes(held.num_bytes)}" for held in holders]
        return HostBudgetError(
            f"{name} needs {format_bytes(num_bytes)} of host memory; of the "
            f"{PREFIX}HOST_BUDGET of {format_bytes(self.budget_bytes)} "
            f"{', '.join(shares) if shares else 'nothing'} is in use",
            num_bytes,
            self.budget_bytes,
        )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    path = copies_folder(folder) / LOCK_NAME
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
