"""The rows of a ledger as one process holds them, and keeps them alive.

That a row still is whose it was is never assumed: every call names the row's generation, too.
"""

import os
from os import SEEK_END, lseek
from pathlib import Path
from typing import Self

from kvcached_core.errors import LedgerError
from kvcached_core.ledger import file as ledger_file
from kvcached_core.ledger.file import (
    CHANGES,
    FILE_BYTES,
    HEADER_WORDS,
    LIFETIME_TOKEN,
    MAGIC,
    PROMISED,
    REMOVED,
    RESIDENT,
    ROW_WORDS,
    STATIC,
    TAKEN,
    Header,
    Row,
    RowKey,
)
from kvcached_core.ledger.forks import disown_in_children
from kvcached_core.ledger.lifetime import Lifetimes, LifetimesReplacedError, lifetimes_path
from kvcached_core.ledger.lock import FileLock
from kvcached_core.ledger.opening import doorbell_path, open_ledger_file

# How long a start, a leave or a command from outside waits for the lock before it says who has it.
PATIENT_SECONDS = 10.0

# In the place of a file's, when it is closed: who still looks from another thread finds nothing.
_NO_WORDS = memoryview(bytes(FILE_BYTES)).cast("q")


class LedgerStore:
    """An open ledger file and the rows that this process keeps in it.

    Any thread may call it. A child that this process forks may not: there every call is refused.

    Args:
        path: The file; its folder exists (see `ledger_directory`).
        capacity_bytes: What a new file says; None opens only a file that is there.

    Raises:
        LedgerError: If the file is missing, is not ours, or says something else.
    """

    _fd: int
    _words: memoryview
    _header: Header

    def __init__(self, path: Path, capacity_bytes: int | None) -> None:
        self.path = path
        self.device = path.stem
        self._wanted_capacity = capacity_bytes
        self._own: dict[RowKey, bytes] = {}  # copies of the rows that this process writes
        self._wakers: set[RowKey] = set()  # of them, those that it has let wake
        self._lifetimes: Lifetimes | None = None
        self._is_held_up = False
        self._is_moving = False
        self._sequence = 0
        self._look_around_ns = 0
        self._pid = os.getpid()
        fd, words = open_ledger_file(path, capacity_bytes, PATIENT_SECONDS)
        self._use(fd, words)
        self._lock = FileLock(fd)
        disown_in_children(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def capacity_bytes(self) -> int:
        """What all instances may hold together, in bytes."""
        return self._capacity_bytes

    def close(self) -> None:
        """Forget the file, and keep none of its rows alive any longer."""
        if self._fd >= 0:
            fd = self._lock.close(PATIENT_SECONDS)
            self._map(-1, _NO_WORDS)
            os.close(fd)
            if self._lifetimes is not None:
                self._lifetimes.close()

    def disown(self) -> None:
        """Let go of what a forked child inherited; see `forks`."""
        if self._fd >= 0:
            os.close(self._fd)
        self._map(-1, _NO_WORDS)
        self._lock = FileLock(-1)
        if self._lifetimes is not None:
            self._lifetimes.close()

    def _use(self, fd: int, words: memoryview) -> None:
        self._map(fd, words)
        self._capacity_bytes = self._header.capacity_bytes

    def _map(self, fd: int, words: memoryview) -> None:
        self._fd = fd
        self._words = words
        self._header = Header(words)
        self._rows = [Row(words, index) for index in range(ledger_file.NUM_ROWS)]

    def _is_intact(self) -> bool:
        """Return whether the file is whole and current; no lock is needed to look."""
        try:
            return lseek(self._fd, 0, SEEK_END) >= FILE_BYTES and self._words[0] == MAGIC
        except OSError:
            return False  # closed, or the parent's

    def _is_removed(self) -> bool:
        """Return whether the file was removed by its last user; it may have been cut off, too."""
        return os.pread(self._fd, 8, 0) == REMOVED.to_bytes(8, "little")

    def _base(self, row: RowKey) -> int:
        number, generation = row
        base = HEADER_WORDS + number * ROW_WORDS
        if self._words[base] != generation:
            raise self._late(row)
        return base

    def _row(self, row: RowKey) -> Row:
        self._base(row)
        return self._rows[row.number]

    def _late(self, row: RowKey) -> LedgerError:
        found = self._rows[row.number]
        now = f"{found.name!r} has its row now" if found.is_live else "its row is free"
        return LedgerError(
            f"this instance has left {self.path}, or was taken for dead ({now}); nothing was "
            "changed: end this process, and start its engine again"
        )

    def _keep(self, row: RowKey, base: int) -> None:
        words = self._words
        words[base + TAKEN] = words[base + RESIDENT] + words[base + PROMISED] + words[base + STATIC]
        words[base + CHANGES] += 1
        self._own[row] = words[base : base + ROW_WORDS].tobytes()

    def _live_rows(self) -> list[Row]:
        return [row for row in self._rows[: self._header.num_rows] if row.is_live]

    def _peers(self, row: Row) -> list[Row]:
        return [other for other in self._live_rows() if other.index != row.index]

    def _held_lifetimes(self) -> Lifetimes:
        """Return the file whose locks tell who lives, with this process's rows held there."""
        token = self._words[LIFETIME_TOKEN]
        found = self._lifetimes
        if found is not None and found.token == token:
            return found
        try:
            found = Lifetimes(self.path, is_new_allowed=token == 0)
        except FileNotFoundError as error:
            raise self._replaced() from error
        if token not in (0, found.token):
            found.close()
            raise self._replaced()
        self._words[LIFETIME_TOKEN] = found.token
        for row in self._own:
            found.hold(row.number)
        if self._lifetimes is not None:
            self._lifetimes.close()
        self._lifetimes = found
        return found

    def _replaced(self) -> LifetimesReplacedError:
        return LifetimesReplacedError(
            f"{lifetimes_path(self.path)} was removed or replaced while engines run, so nobody can "
            "tell which of them live; the next engine that starts sets the ledger aside"
        )

    def _reap(self) -> None:
        """Clear the rows that nobody keeps alive: their memory went back with their processes."""
        lifetimes = self._held_lifetimes()
        for row in self._live_rows():
            if row.key not in self._own and not lifetimes.is_held(row.index):
                row.clear()
                doorbell_path(self.path, row.key).unlink(missing_ok=True)

    def _unlink_if_unused(self) -> bool:
        if any(self._live_rows()):
            return False
        self._words[0] = REMOVED
        # In this order: once the path is free, somebody else's files may lie there.
        lifetimes_path(self.path).unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)
        return True
