"""The layout of a ledger file: 64-bit words, a header and fixed rows.

Changing anything here needs a new `VERSION`. Magic number and version stay the first two words, and
the length stays as it is: an older kvcached that meets the file then sees another version, and
leaves it alone.
"""

from typing import NamedTuple

MAGIC = int.from_bytes(b"KVCACHE1", "little")
REMOVED = int.from_bytes(b"KVCGONE1", "little")  # in the place of MAGIC, before a file is unlinked
VERSION = 4
NUM_ROWS = 64
HEADER_WORDS = 64
ROW_WORDS = 64
NO_LIMIT = -1
# In the place of an engine and its release: the row of a program that is no engine. What it holds
# counts as weights that never yield, so no rule asks it for anything.
PROGRAM = "program"
FILE_BYTES = 8 * (HEADER_WORDS + NUM_ROWS * ROW_WORDS)

# Words of the header. SEQUENCE counts the changes; while somebody writes, it is the negative number
# of that process, as it sees itself. ALLOCATED grows by every byte that was promised or announced
# and is allocated now: what a device said to be free before that is too much.
NUM_USED_ROWS, CAPACITY, SEQUENCE, LIFETIME_TOKEN, ALLOCATED = 2, 3, 4, 6, 7

# Words of a row that are read and written in every step, and what is summed over all rows; a row
# without an instance has zeros there. TAKEN is RESIDENT + PROMISED + STATIC. GENERATION is first.
LIMIT, FLOOR, RESIDENT, PROMISED, STATIC, TAKEN, WAITING = 2, 3, 5, 8, 9, 10, 11
ASKED, OWED, NUM_ASKED, NOTICES, CHANGES, FREED = 12, 13, 15, 16, 17, 24

# Words of a row: how much of its weights is resident, and since when it wakes.
WEIGHTS, WAKING = 28, 46

# Zeros in the words from 28 on are what a kvcached without elastic weights writes there. 34 is kept
# for holds, so that they need no other version. Nobody has given 8 to 63 of the header a name.
# How long activations took (`Activations`) is in 32 and 33, what maps and unmaps took (`CallTimes`)
# in 35 to 39 and in 40 to 44.
_ACTIVATIONS, _ACTIVATIONS_WORDS = 32, 2
_MAP_TIMES, _UNMAP_TIMES, _TIMES_WORDS = 35, 40, 5
_NAME, _NAME_WORDS = 48, 8  # as long as a name may be
_ENGINE, _ENGINE_WORDS = 56, 8


class RowKey(NamedTuple):
    """An instance's row, and which of the instances that ever had it.

    Attributes:
        number: Which row it is.
        generation: No two instances of a device have the same.
    """

    number: int
    generation: int


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
    sequence = _Word(SEQUENCE)
    next_generation = _Word(5)
    lifetime_token = _Word(LIFETIME_TOKEN)  # names the file whose locks tell which rows live
    allocated_bytes = _Word(ALLOCATED)

    def __init__(self, words: memoryview) -> None:
        super().__init__(words, 0)

    def initialise(self, capacity_bytes: int, first_generation: int) -> None:
        """Fill the header of a new file; the magic number comes last."""
        self.version = VERSION
        self.capacity_bytes = capacity_bytes
        self.next_generation = first_generation
        self.magic = MAGIC


class Row(_Words):
    """One instance."""

    __slots__ = ("index",)

    generation = _Word(0)
    pid = _Word(1)  # of who registered, for people to read: nothing is decided by it
    limit_bytes = _Word(LIMIT)
    floor_bytes = _Word(FLOOR)
    priority = _Word(4)
    resident_bytes = _Word(RESIDENT)
    used_bytes = _Word(6)
    cached_bytes = _Word(7)
    promised_bytes = _Word(PROMISED)
    static_bytes = _Word(STATIC)
    taken_bytes = _Word(TAKEN)
    waiting_bytes = _Word(WAITING)  # what it was refused and still wants
    asked_bytes = _Word(ASKED)
    owed_bytes = _Word(OWED)  # part of what is asked: requests have to stop for it
    coming_bytes = _Word(14)
    num_asked = _Word(NUM_ASKED)  # times that others asked for memory
    num_notices = _Word(NOTICES)  # grows whenever there is something new to look at in the row
    num_changes = _Word(CHANGES)
    last_used_ns = _Word(18)
    page_bytes = _Word(19)
    virtual_bytes = _Word(20)
    least_bytes = _Word(21)  # what one request of the largest size needs
    num_mapped_bytes = _Word(22)
    num_unmapped_bytes = _Word(23)
    num_freed_bytes = _Word(FREED)  # unmapped, or promised and not needed
    num_refused = _Word(25)  # promises that were not given in full
    num_answered = _Word(26)
    pid_namespace = _Word(27)  # in which `pid` means something; 0 where it could not be read
    weights_bytes = _Word(WEIGHTS)  # part of what is resident
    weights_needed_bytes = _Word(29)  # to run; 0 for an instance whose weights never yield
    weights_offered_bytes = _Word(30)  # of those that are resident, what may be asked for
    token_bytes = _Word(31)  # KV of one token, or 0 where nobody said so
    # No equal or lower priority is given weights before. Where none are offered yet, there will be
    # news of them until then.
    weights_kept_until_ns = _Word(45)
    waking_since_ns = _Word(WAKING)  # and so before whom it wakes; 0 for one that does not
    weights_wish = _Word(47)  # of a `WeightsWish`: what somebody outside wants

    def __init__(self, words: memoryview, index: int, base: int | None = None) -> None:
        super().__init__(words, HEADER_WORDS + index * ROW_WORDS if base is None else base)
        self.index = index

    @classmethod
    def of_copy(cls, copy: bytes | bytearray) -> "Row":
        """Return a row over what `copy` returned."""
        return cls(memoryview(copy).cast("q"), index=0, base=0)

    @property
    def key(self) -> RowKey:
        """The row's number and whose it is."""
        return RowKey(self.index, self.generation)

    @property
    def held_bytes(self) -> int:
        """What is held for KV, or promised: what limit and floor are about."""
        words, base = self.words, self.base
        return words[base + RESIDENT] - words[base + WEIGHTS] + words[base + PROMISED]

    @property
    def unmet_floor_bytes(self) -> int:
        """What is missing to the floor."""
        return max(self.floor_bytes - self.held_bytes, 0)

    @property
    def excess_bytes(self) -> int:
        """What is held, or promised and about to be mapped, above the limit."""
        limit_bytes = self.words[self.base + LIMIT]
        return max(self.held_bytes - limit_bytes, 0) if limit_bytes >= 0 else 0

    @property
    def is_live(self) -> bool:
        """Whether an instance holds this row."""
        return self.generation != 0

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

    @property
    def map_times(self) -> memoryview:
        """The words that say what maps took."""
        return self._part(_MAP_TIMES, _TIMES_WORDS)

    @property
    def unmap_times(self) -> memoryview:
        """The words that say what unmaps took."""
        return self._part(_UNMAP_TIMES, _TIMES_WORDS)

    @property
    def activations(self) -> memoryview:
        """The words that say how often it woke, and what that took."""
        return self._part(_ACTIVATIONS, _ACTIVATIONS_WORDS)

    def _part(self, offset: int, num_words: int) -> memoryview:
        return self.words[self.base + offset : self.base + offset + num_words]

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
