"""The layout of a ledger file: 64-bit words, a header and fixed rows, and the lock on it.

Changing anything here needs a new `VERSION`.
"""

import fcntl
import os
import struct
import threading

MAGIC = int.from_bytes(b"KVCACHE1", "little")
VERSION = 3
NUM_ROWS = 64
NUM_HOLDERS = 4
HEADER_WORDS = 64
ROW_WORDS = 64
NO_LIMIT = -1
FILE_BYTES = 8 * (HEADER_WORDS + NUM_ROWS * ROW_WORDS)

# Words of the header, and one of a row that an engine reads between every two steps.
NUM_USED_ROWS, CAPACITY, LAST_REAP = 2, 3, 5
NOTICES = 29

_NAME_WORDS = 16
_ENGINE_WORDS = 8
_HOLDERS = 1
_NAME = 40
_ENGINE = _NAME + _NAME_WORDS


def _flock(kind: int) -> bytes:
    # struct flock: type, whence, start, length (0 is the whole file), pid (0 for this kind of lock)
    return struct.pack("hhqqixxxx", kind, os.SEEK_SET, 0, 0, 0)


# Where a row keeps what is read and written in every step, and what is summed over all rows; a dead
# row has zeros there. TAKEN is RESIDENT + PROMISED + STATIC.
STATE, LIMIT, FLOOR, RESIDENT, PROMISED, STATIC, WAITING, TAKEN, CHANGES = (
    *(0, 9, 10, 12, 15, 25, 27, 31, 32),
)

_control, _WAIT, _DROP = fcntl.fcntl, fcntl.F_OFD_SETLKW, fcntl.F_OFD_SETLK
_WRITE_LOCK = _flock(fcntl.F_WRLCK)
_UNLOCK = _flock(fcntl.F_UNLCK)


class FileLock:
    """A lock on a whole open file, for the processes and for the threads of this one."""

    __slots__ = ("_fd", "_threads")

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._threads = threading.Lock()

    def __enter__(self) -> None:
        self._threads.acquire()
        try:
            _control(self._fd, _WAIT, _WRITE_LOCK)
        except BaseException:
            self._threads.release()
            raise

    def __exit__(self, *_: object) -> None:
        _control(self._fd, _DROP, _UNLOCK)
        self._threads.release()

    def drop(self) -> None:
        """Let other processes have the file although this lock is still held by the thread."""
        _control(self._fd, _DROP, _UNLOCK)

    def take(self, fd: int) -> None:
        """Lock another file in the place of this one; after `drop`."""
        _control(fd, _WAIT, _WRITE_LOCK)
        self._fd = fd


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
    num_rows = _Word(NUM_USED_ROWS)  # rows from here on were never used
    capacity_bytes = _Word(CAPACITY)
    headroom_bytes = _Word(4)
    last_reap_ns = _Word(LAST_REAP)

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

    _state = _Word(STATE)
    limit_bytes = _Word(LIMIT)
    floor_bytes = _Word(FLOOR)
    priority = _Word(11)
    resident_bytes = _Word(RESIDENT)
    used_bytes = _Word(13)
    cached_bytes = _Word(14)
    promised_bytes = _Word(PROMISED)
    asked_bytes = _Word(16)
    last_used_ns = _Word(17)
    page_bytes = _Word(18)
    virtual_bytes = _Word(19)
    num_mapped_bytes = _Word(20)
    num_unmapped_bytes = _Word(21)
    num_refused = _Word(22)  # promises that were not given in full
    num_asked = _Word(23)  # times that others asked for memory
    num_answered = _Word(24)
    static_bytes = _Word(STATIC)
    coming_bytes = _Word(26)
    waiting_bytes = _Word(WAITING)  # what it was refused and still wants
    owed_bytes = _Word(28)  # part of what is asked: requests have to stop for it
    num_notices = _Word(NOTICES)  # grows whenever there is something new to look at in the row
    least_bytes = _Word(30)  # what one request of the largest size needs
    taken_bytes = _Word(TAKEN)
    num_changes = _Word(CHANGES)

    def __init__(self, words: memoryview, index: int) -> None:
        super().__init__(words, HEADER_WORDS + index * ROW_WORDS)
        self.index = index

    @classmethod
    def of_copy(cls, copy: bytes) -> "Row":
        """Return a row over what `copy` returned."""
        row = cls(memoryview(copy).cast("q"), 0)
        row.base = 0
        return row

    @property
    def unmet_floor_bytes(self) -> int:
        """What is missing to the floor."""
        return max(self.floor_bytes - self.resident_bytes - self.promised_bytes, 0)

    @property
    def excess_bytes(self) -> int:
        """What is held, or promised and about to be mapped, above the limit."""
        held_bytes = self.resident_bytes + self.promised_bytes
        return max(held_bytes - self.limit_bytes, 0) if self.limit_bytes >= 0 else 0

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
        self.words[self.base : self.base + ROW_WORDS] = _EMPTY_ROW

    def copy(self) -> bytes:
        """Return the row's words."""
        return self.words[self.base : self.base + ROW_WORDS].tobytes()

    def restore(self, copy: bytes) -> None:
        """Write words from `copy` back."""
        self.words[self.base : self.base + ROW_WORDS] = memoryview(copy).cast("q")


_EMPTY_ROW = memoryview(bytes(8 * ROW_WORDS)).cast("q")


def column_sum(words: memoryview, column: int, num_rows: int) -> int:
    """Return the sum of one word of the first `num_rows` rows."""
    end = HEADER_WORDS + num_rows * ROW_WORDS
    return sum(words[HEADER_WORDS + column : end : ROW_WORDS])
