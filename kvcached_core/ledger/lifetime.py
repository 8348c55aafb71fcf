"""Which rows of a ledger somebody still keeps alive.

Each process that keeps a row holds a lock on one byte of a second file for as long as it lives. No
process id is compared, so any number of ranks may keep a row, and processes of other PID namespaces
count. Whoever opens, holds or asks here has the ledger's lock; only a reader asks without it.
"""

import os
import struct
import time
from pathlib import Path

from kvcached_core.errors import LedgerError
from kvcached_core.ledger.file import RowKey
from kvcached_core.ledger.lock import drop_byte, hold_byte, is_byte_held

_WORD = struct.Struct("q")


class LifetimesReplacedError(LedgerError):
    """The second file is not the one that a ledger's rows are kept alive in."""


class Lifetimes:
    """The second file of a ledger, `<device>.alive`: locks on bytes, and a few words.

    Its first word is a token that tells it from another file at the same path; behind it lies for
    each row the generation that left last. So a late process of that one does not write its row
    into a new ledger after a repair.

    Args:
        ledger_path: The ledger.
        is_new_allowed: Whether a missing file is made.

    Raises:
        FileNotFoundError: If it is missing and must not be made.
        LedgerError: If it cannot be opened or made.
    """

    def __init__(self, ledger_path: Path, *, is_new_allowed: bool) -> None:
        self.path = lifetimes_path(ledger_path)
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            self._fd = os.open(self.path, flags | (os.O_CREAT if is_new_allowed else 0), 0o600)
            try:
                self.token = self._word(0)
                if self.token == 0 and is_new_allowed:
                    self.token = time.time_ns()
                    self._set_word(0, self.token)
            except BaseException:
                os.close(self._fd)
                raise
        except FileNotFoundError:
            raise
        except OSError as error:
            raise LedgerError(
                f"{self.path} cannot be opened: {error.strerror}; remove it when no engine runs, "
                "or set KVCACHED_DIR to another folder"
            ) from error

    def hold(self, index: int) -> None:
        """Keep a row alive until it is dropped, or this process ends."""
        hold_byte(self._fd, index)

    def drop(self, index: int) -> None:
        """Keep a row alive no longer."""
        drop_byte(self._fd, index)

    def is_held(self, index: int) -> bool:
        """Return whether anybody else keeps a row alive, whichever generation of it."""
        return is_byte_held(self._fd, index)

    def say_left(self, row: RowKey) -> None:
        """Write down that an instance gave its row back."""
        self._set_word(1 + row.number, row.generation)

    def has_left(self, row: RowKey) -> bool:
        """Return whether an instance, or a later one in its row, gave the row back."""
        return self._word(1 + row.number) >= row.generation

    def close(self) -> None:
        """Drop everything."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _word(self, number: int) -> int:
        found = os.pread(self._fd, _WORD.size, _WORD.size * number)
        return int(_WORD.unpack(found)[0]) if len(found) == _WORD.size else 0

    def _set_word(self, number: int, value: int) -> None:
        os.pwrite(self._fd, _WORD.pack(value), _WORD.size * number)


def own_pid_namespace() -> int:
    """Return the number of this process's PID namespace, or 0; nothing is decided by it."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino  # noqa: PTH116  a link to what is no path
    except OSError:
        return 0


def lifetimes_path(ledger_path: Path) -> Path:
    """Return where the second file of a ledger lies."""
    return ledger_path.with_suffix(".alive")
