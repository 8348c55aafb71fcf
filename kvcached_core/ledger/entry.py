"""Coming into a ledger: the lock, and what has to be right before anything is read or written.

The file may have been removed, cut off or set aside; whoever had the lock before may have ended in
the middle of what it wrote, or be stopped there.
"""

import logging
import os
import threading
import time
from contextlib import suppress
from os import SEEK_END, lseek
from pathlib import Path

from kvcached_core.errors import LedgerBusyError, LedgerError
from kvcached_core.ledger.changes import Changes, PendingChanges, write_missed
from kvcached_core.ledger.file import (
    ALLOCATED,
    FILE_BYTES,
    MAGIC,
    SEQUENCE,
    WAKING,
    Row,
    RowKey,
)
from kvcached_core.ledger.opening import busy, open_ledger_file
from kvcached_core.ledger.room import waiting_bytes, waiting_rows
from kvcached_core.ledger.store import PATIENT_SECONDS, LedgerStore

logger = logging.getLogger("kvcached")

# A scheduler, or a step, waits this long for the lock, and not again until it has had it. With the
# time that a busy machine takes to wake it, that is under 5 ms.
SCHEDULER_SECONDS = 0.004
LOOK_INTERVAL_NS = 50_000_000
_LATER_SECONDS = 0.05


class LedgerEntry(LedgerStore):
    """A ledger that is entered and left; see `LedgerStore` for what opens it."""

    def __init__(self, path: Path, capacity_bytes: int | None) -> None:
        self._pending = PendingChanges()
        super().__init__(path, capacity_bytes)

    def _enter(self, seconds: float | None = None, *, is_looking_around: bool = False) -> bool:
        """Lock the file that is current, whole and ours; return whether that was in time.

        Args:
            seconds: How long to wait. None is for a scheduler, or a step: some milliseconds, and
                nothing if the lock was held for too long the last time.
            is_looking_around: Whether to look now and then for what costs more to see.
        """
        is_soon = seconds is None
        if seconds is None:
            seconds = 0.0 if self._is_held_up else SCHEDULER_SECONDS
        lock = self._lock
        if not lock.acquire(seconds):
            self._is_held_up |= is_soon
            return False
        try:
            # Reading behind the end of a file that somebody cut off would end the process.
            if lseek(self._fd, 0, SEEK_END) < FILE_BYTES or self._words[0] != MAGIC:
                self._move(seconds)
            if is_looking_around:
                self._look_around_ns = time.monotonic_ns() + LOOK_INTERVAL_NS
                self._look_for_file(seconds)
            words = self._words
            self._sequence = words[SEQUENCE]
            words[SEQUENCE] = -self._pid
            if self._sequence < 0 or self._is_moving or self._pending.is_there:
                self._catch_up()
            if is_looking_around:
                with suppress(LedgerError):  # who cannot tell reaps nobody
                    self._reap()
        except LedgerBusyError:
            lock.release()
            self._is_held_up |= is_soon
            return False
        except BaseException:
            lock.release()
            raise
        self._is_held_up = False
        return True

    def _enter_patiently(self) -> None:
        """Lock for who may wait.

        Raises:
            LedgerBusyError: If it is held for too long, with who holds it.
        """
        if not self._enter(PATIENT_SECONDS, is_looking_around=True):
            raise busy(self._fd, self.path)

    def _exit(self) -> None:
        """Leave, in a `finally` around coming in: there may be nothing to leave."""
        lock = self._lock
        if lock.is_mine():
            self._words[SEQUENCE] = self._sequence + 1
            lock.release()

    def _waiting(self) -> list[RowKey]:
        """Return the rows that wait for memory and could have some."""
        return waiting_rows(self._words, self._rows) if waiting_bytes(self._words) else []

    def _look(self, row: RowKey) -> int | None:
        """Return where the row lies; None if that needs the lock, and it is held for too long."""
        if self._is_intact():
            return self._base(row)
        try:
            if not self._enter():
                return None
            return self._base(row)
        finally:
            self._exit()

    def _change(
        self, row: RowKey, changes: Changes, *, is_freeing: bool = False, is_looking: bool = False
    ) -> list[RowKey]:
        """Write changes of the own row, now or later.

        Returns:
            If they leave others more than before, the rows that wait and could have some.
        """
        now_ns = time.time_ns()
        try:
            if not self._enter(is_looking_around=is_looking):
                self._put_off(row, changes)
                return []
            base, words = self._base(row), self._words
            was_waking = words[base + WAKING]
            words[ALLOCATED] += changes.write(self._rows[row.number], now_ns)
            self._keep(row, base)
            is_over = was_waking and not words[base + WAKING]
            return self._waiting() if is_freeing or is_over else []
        finally:
            self._exit()

    def _put_off(self, row: RowKey, changes: Changes) -> None:
        if self._pending.add(row, changes):
            # An idle engine may not come again for long.
            threading.Thread(target=self._write_later, name="kvcached-ledger", daemon=True).start()

    def _write_later(self) -> None:
        while self._pending.keep_writer():
            time.sleep(_LATER_SECONDS)
            try:
                self._enter()
            except LedgerError:  # closed, or its files are not there now
                self._pending.drop_writer()
                return
            except Exception:
                self._pending.drop_writer()
                logger.exception(
                    "kvcached: what %s lacks is written with the next change", self.path
                )
                return
            finally:
                self._exit()

    def _catch_up(self) -> None:
        """Do what is seldom to be done before anything else."""
        if self._sequence < 0:
            self._heal()
        if self._is_moving:
            self._restore()
        if self._pending.is_there:
            self._write_pending()

    def _look_for_file(self, seconds: float) -> None:
        if not os.fstat(self._fd).st_nlink:  # somebody removed the file with their own hands
            self._words[0] = 0
            self._move(seconds)

    def _heal(self) -> None:
        """Go on behind somebody that ended while it wrote; its own row is reaped."""
        self._sequence = time.monotonic_ns()  # no reader has seen this number
        for row in self._live_rows():
            row.taken_bytes = row.resident_bytes + row.promised_bytes + row.static_bytes
            row.num_notices += 1

    def _write_pending(self) -> None:
        """Write what could not be written while the lock was held for too long."""
        now_ns = time.time_ns()
        for key, changes in self._pending.take().items():
            row = self._rows[key.number]
            if row.key == key:
                self._words[ALLOCATED] += changes.write(row, now_ns)
                self._keep(key, row.base)

    def _move(self, seconds: float) -> None:
        """Leave a file that was removed or set aside for the one in its place."""
        self._is_moving = True
        while not self._is_intact():
            if self._is_removed():
                self._own.clear()  # nobody was in it: what is left here belongs to who has left
            capacity_bytes = self._capacity_bytes if self._own else self._wanted_capacity
            self._lock.drop()  # to open it takes the lock
            fd, words = open_ledger_file(self.path, capacity_bytes, seconds)
            if not self._lock.move(fd, seconds):
                error = busy(fd, self.path)
                os.close(fd)
                raise error
            os.close(self._fd)
            self._use(fd, words)

    def _restore(self) -> None:
        """Write the own rows into the file that was moved to."""
        for key, copy in list(self._own.items()):
            lifetimes = self._held_lifetimes()
            row, mine = self._rows[key.number], Row.of_copy(copy)
            is_mine = row.key == key
            if lifetimes.has_left(key) or (row.is_live and not is_mine):
                del self._own[key]
                lifetimes.drop(key.number)
            elif not is_mine:
                row.restore(copy)
                self._header.num_rows = max(self._header.num_rows, key.number + 1)
            else:  # another process of the instance came first, and may have known less
                other = mine
                if row.num_changes < mine.num_changes:
                    other = Row.of_copy(row.copy())
                    row.restore(copy)
                write_missed(row, other)
        self._is_moving = False
