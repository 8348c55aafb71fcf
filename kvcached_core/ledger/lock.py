"""Locks on open file descriptions: the kernel drops them when their holder dies."""

import errno
import fcntl
import os
import struct
import sys
import threading
import time

from kvcached_core.errors import LedgerError

_FLOCK = "hhqqixxxx"  # type, whence, start, length (0 is all there is), pid (0 for these locks)
if sys.platform != "linux" or struct.calcsize("l") != 8 or struct.calcsize(_FLOCK) != 32:  # noqa: PLR2004  sizes of struct flock
    raise ImportError("kvcached needs a 64-bit Linux: its ledgers are locked by F_OFD_SETLK")

# Between two tries for a lock that somebody else holds; the shortest is what a change takes.
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 20e-6, 1e-3

_control, _TRY, _ASK = fcntl.fcntl, fcntl.F_OFD_SETLK, fcntl.F_OFD_GETLK


def _flock(kind: int, start: int = 0, length: int = 0) -> bytes:
    return struct.pack(_FLOCK, kind, os.SEEK_SET, start, length, 0)


_NOT_OURS = (
    "this ledger is closed, or was opened by the parent of this process: a forked child owns "
    "nothing"
)
_WRITE_LOCK = _flock(fcntl.F_WRLCK)
_UNLOCK = _flock(fcntl.F_UNLCK)


class FileLock:
    """A lock on a whole open file, for the processes and for the threads of this one.

    A signal's handler may raise between any two instructions of the main thread. So who locks calls
    `release` in a `finally` around `acquire`; and a thread that has the lock still, because it was
    interrupted on its way out, gets it again, and then gives all of it back.

    Args:
        fd: The file.
    """

    __slots__ = ("_fd", "_threads", "is_mine")

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._threads = threading.RLock()
        # Whether this thread has the lock; it is known as soon as it has it, in no instruction of
        # its own. Condition uses the same method.
        self.is_mine = self._threads._is_owned  # type: ignore[attr-defined]  # noqa: SLF001  see above

    def acquire(self, seconds: float) -> bool:
        """Return whether the lock was had within `seconds`; with 0 it is tried once.

        Raises:
            LedgerError: If the file is closed.
        """
        if not self._threads.acquire(blocking=False):
            deadline = time.monotonic() + seconds
            if not seconds or not self._threads.acquire(timeout=seconds):
                return False
            seconds = max(deadline - time.monotonic(), 0.0)
        try:
            try:
                _control(self._fd, _TRY, _WRITE_LOCK)  # nearly always all there is to do
            except (OSError, ValueError):
                if not self._take(seconds):
                    self.release()
                    return False
        except BaseException:
            self.release()
            raise
        return True

    def release(self) -> None:
        """Give the lock back; this thread has it."""
        try:
            if self._fd >= 0:
                _control(self._fd, _TRY, _UNLOCK)
        finally:
            self._threads.release()
            while self.is_mine():
                self._threads.release()

    def drop(self) -> None:
        """Let other processes have the file although the thread still has this lock."""
        _control(self._fd, _TRY, _UNLOCK)

    def move(self, fd: int, seconds: float) -> bool:
        """Lock another file in the place of the dropped one; return whether that was in time."""
        dropped, self._fd = self._fd, fd
        if not self._take(seconds):
            self._fd = dropped
            return False
        return True

    def close(self, seconds: float) -> int:
        """Wait for whoever uses the file in this process; return the descriptor to close."""
        if self.is_mine():
            self.release()
        has_threads = self._threads.acquire(timeout=seconds)
        fd, self._fd = self._fd, -1
        if has_threads:
            self._threads.release()
        return fd

    def _take(self, seconds: float) -> bool:
        if self._fd < 0:
            raise LedgerError(_NOT_OURS)
        try:
            _control(self._fd, _TRY, _WRITE_LOCK)
        except OSError as error:
            self._check(error)
            return seconds > 0 and self._take_later(seconds)
        return True

    def _take_later(self, seconds: float) -> bool:
        deadline, pause = time.monotonic() + seconds, _FIRST_PAUSE_SECONDS
        while (left := deadline - time.monotonic()) > 0:
            time.sleep(min(pause, left))
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
            try:
                _control(self._fd, _TRY, _WRITE_LOCK)
            except OSError as error:
                self._check(error)
            else:
                return True
        return False

    def _check(self, error: OSError) -> None:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise LedgerError(_NOT_OURS) from error


def hold_byte(fd: int, number: int) -> None:
    """Share a lock on one byte of a file until it is dropped, or the description is closed."""
    _control(fd, _TRY, _flock(fcntl.F_RDLCK, number, 1))


def take_byte(fd: int, number: int) -> bool:
    """Lock one byte of a file for this open description alone; return whether nobody else has it.

    `hold_byte` then shares it, without a moment in between in which somebody else could take it.
    """
    try:
        _control(fd, _TRY, _flock(fcntl.F_WRLCK, number, 1))
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        return False
    return True


def drop_byte(fd: int, number: int) -> None:
    """Give a byte's lock back."""
    _control(fd, _TRY, _flock(fcntl.F_UNLCK, number, 1))


def is_byte_held(fd: int, number: int) -> bool:
    """Return whether somebody else than this open description holds a byte."""
    found = _control(fd, _ASK, _flock(fcntl.F_WRLCK, number, 1))
    return bool(struct.unpack(_FLOCK, found)[0] != fcntl.F_UNLCK)
