"""The layout of a ledger file: 64-bit words, a header and fixed rows, and the lock on it.

Changing anything here needs a new `VERSION`. Places for floors, priorities and pressure are part of
this version already.
"""

import fcntl
import os
import struct
import threading

MAGIC = int.from_bytes(b"KVCACHE1", "little")
VERSION = 2
NUM_ROWS = 64
NUM_HOLDERS = 4
HEADER_WORDS = 64
ROW_WORDS = 64
FILE_BYTES = 8 * (HEADER_WORDS + NUM_ROWS * ROW_WORDS)

_NAME_WORDS = 16
_ENGINE_WORDS = 8
_HOLDERS = 1
_NAME = 40
_ENGINE = _NAME + _NAME_WORDS


def _flock(kind: int) -> bytes:
    # struct flock: type, whence, start, length (0 is the whole file), pid (0 for this kind of lock)
    return struct.pack("hhqqixxxx", kind, os.SEEK_SET, 0, 0, 0)


_WRITE_LOCK = _flock(fcntl.F_WRLCK)
_UNLOCK = _flock(fcntl.F_UNLCK)


class FileLock:
    """A lock on a whole open file, for the processes and for the threads of this one."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._threads = threading.Lock()

    def __enter__(self) -> None:
        self._threads.acquire()
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLKW, _WRITE_LOCK)
        except BaseException:
            self._threads.release()
            raise

    def __exit__(self, *_: object) -> None:
        fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _UNLOCK)
        self._threads.release()


class _Word:
    """A descriptor for one 64-bit word behind an object's `base`."""

    def __init__(self, offset: int) -> None:
        self._offset = offset

    def __get__(self, owner: "_Words", kind: type["_Words"]) -> int:
        return owner.words[owner.base + self._offset]

    def __set__(self, owner: "_Words", value: int) -> None:
        owner.words[owner.base + self._offset] = value


class _Words:
    __slots__ = ("base", "words")

    def __init__(self, words: memoryview, base: int) -> None:
        self.words = words
        self.base = base

    def release(self) -> None:
        """Let go of the shared memory."""
        self.words.release()

    def _text(self, offset: int, num_words: int) -> str:
        start = self.base + offset
        return bytes(self.words[start : start + num_words]).rstrip(b"\0").decode("utf-8", "replace")

    def _set_text(self, offset: int, num_words: int, text: str) -> None:
        encoded = text.encode()[: 8 * num_words].ljust(8 * num_words, b"\0")
        start = self.base + offset
        self.words[start : start + num_words] = memoryview(encoded).cast("q")


class Header(_Words):
    """What is true for the whole device."""

    __slots__ = ()

    magic = _Word(0)
    version = _Word(1)
    num_rows = _Word(2)  # rows from here on were never used
    capacity_bytes = _Word(3)
    headroom_bytes = _Word(4)
    last_reap_ns = _Word(5)

    def __init__(self, words: memoryview) -> None:
        super().__init__(words, 0)

    def initialise(self, capacity_bytes: int) -> None:
        """Fill the header of a new file; the magic number comes last."""
        self.version = VERSION
        self.capacity_bytes = capacity_bytes
        self.magic = MAGIC


class Row(_Words):
    """One instance."""

    __slots__ = ("index",)

    _state = _Word(0)
    limit_bytes = _Word(9)
    floor_bytes = _Word(10)
    priority = _Word(11)
    resident_bytes = _Word(12)
    used_bytes = _Word(13)
    cached_bytes = _Word(14)
    promised_bytes = _Word(15)
    asked_bytes = _Word(16)
    last_used_ns = _Word(17)
    page_bytes = _Word(18)
    virtual_bytes = _Word(19)
    num_mapped_bytes = _Word(20)
    num_unmapped_bytes = _Word(21)
    num_refused = _Word(22)
    num_pressure_asked = _Word(23)
    num_pressure_answered = _Word(24)
    static_bytes = _Word(25)
    coming_bytes = _Word(26)

    def __init__(self, words: memoryview, index: int) -> None:
        super().__init__(words, HEADER_WORDS + index * ROW_WORDS)
        self.index = index

    @property
    def is_live(self) -> bool:
        """Whether an instance holds this row."""
        return self._state == 1

    @is_live.setter
    def is_live(self, value: bool) -> None:
        self._state = int(value)

    @property
    def name(self) -> str:
        """The instance's name."""
        return self._text(_NAME, _NAME_WORDS)

    @name.setter
    def name(self, value: str) -> None:
        self._set_text(_NAME, _NAME_WORDS, value)

    @property
    def engine(self) -> str:
        """The engine and its release."""
        return self._text(_ENGINE, _ENGINE_WORDS)

    @engine.setter
    def engine(self, value: str) -> None:
        self._set_text(_ENGINE, _ENGINE_WORDS, value)

    def holder(self, number: int) -> tuple[int, int]:
        """Return pid and start time of a process that keeps the row alive; the owner is 0."""
        at = self.base + _HOLDERS + 2 * number
        return self.words[at], self.words[at + 1]

    def set_holder(self, number: int, pid: int, started: int) -> None:
        """Set pid and start time of a process that keeps the row alive."""
        at = self.base + _HOLDERS + 2 * number
        self.words[at], self.words[at + 1] = pid, started

    def clear(self) -> None:
        """Empty the row; it has no instance afterwards."""
        for word in range(self.base, self.base + ROW_WORDS):
            self.words[word] = 0
