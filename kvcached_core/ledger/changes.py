"""Changes of a row by its own instance, and those that wait for a lock that is held too long."""

import threading
from dataclasses import dataclass, field

from kvcached_core.ledger.file import RESIDENT, WEIGHTS, Row, RowKey
from kvcached_core.ledger.times import NO_CALLS, CallTimes
from kvcached_core.ledger.weight_changes import WeightChanges, write_weights


@dataclass
class Acknowledgement:
    """What an instance says when it is asked; sizes in bytes.

    Attributes:
        coming_bytes: What the workers are about to unmap.
        num_asked: Which ask it is for; of a later one the rest stays. None answers all.
        freed_bytes: What the instance had freed, ever, when it answered: what is announced may be
            freed before it is written.
    """

    coming_bytes: int
    num_asked: int | None
    freed_bytes: int


@dataclass
class Changes:
    """What an instance did; sizes in bytes.

    The sums of several calls say the same as the calls, in any order. So what waits stays small.

    Attributes:
        unpromised_bytes: Promises that were taken back.
        mapped_bytes: What was mapped.
        unmapped_bytes: What was unmapped.
        unneeded_bytes: Promises that needed no memory.
        stuck_bytes: What could not be unmapped.
        counts: Used and cached bytes, the last that were told; None for none.
        answers: Answers to being asked.
        is_waiting_over: Whether nothing waits for memory any more.
        map_times: What maps took.
        unmap_times: What unmaps took.
        weights: What was done with weights; None for nothing.
    """

    unpromised_bytes: int = 0
    mapped_bytes: int = 0
    unmapped_bytes: int = 0
    unneeded_bytes: int = 0
    stuck_bytes: int = 0
    counts: tuple[int, int] | None = None
    acknowledgements: list[Acknowledgement] = field(default_factory=list)
    is_waiting_over: bool = False
    map_times: CallTimes = NO_CALLS
    unmap_times: CallTimes = NO_CALLS
    weights: WeightChanges | None = None

    def add(self, later: "Changes") -> None:
        """Add what was done afterwards."""
        self.unpromised_bytes += later.unpromised_bytes
        self.mapped_bytes += later.mapped_bytes
        self.unmapped_bytes += later.unmapped_bytes
        self.unneeded_bytes += later.unneeded_bytes
        self.stuck_bytes += later.stuck_bytes
        self.counts = later.counts or self.counts
        self.acknowledgements += later.acknowledgements
        self.is_waiting_over |= later.is_waiting_over
        self.map_times += later.map_times
        self.unmap_times += later.unmap_times
        if later.weights is not None:
            self.weights = self.weights or WeightChanges()
            self.weights.add(later.weights)

    def write(self, row: Row, now_ns: int) -> int:
        """Write it into the instance's row.

        Returns:
            How many bytes are allocated now that were promised or announced.
        """
        for given in self.acknowledgements:
            write_acknowledgement(row, given)
        if self.is_waiting_over:
            row.waiting_bytes = 0
        row.promised_bytes = max(row.promised_bytes - self.unpromised_bytes, 0)
        write_moves(row, self.mapped_bytes, self.unmapped_bytes, self.unneeded_bytes)
        write_stuck(row, self.stuck_bytes)
        write_times(row, self.map_times, self.unmap_times)
        weights_bytes = 0 if self.weights is None else self.weights.write(row, now_ns)
        if self.counts is not None:
            write_counts(row, *self.counts, now_ns)
        return self.mapped_bytes + weights_bytes


def write_moves(row: Row, mapped_bytes: int, unmapped_bytes: int, unneeded_bytes: int) -> None:
    """Write into the instance's row what was mapped and unmapped, and which promises are over."""
    freed_bytes = unmapped_bytes + unneeded_bytes
    if not mapped_bytes and not freed_bytes:
        return
    row.promised_bytes = max(row.promised_bytes - mapped_bytes - unneeded_bytes, 0)
    row.resident_bytes = max(row.resident_bytes + mapped_bytes - unmapped_bytes, 0)
    row.coming_bytes = max(row.coming_bytes - freed_bytes, 0)
    row.num_mapped_bytes += mapped_bytes
    row.num_unmapped_bytes += unmapped_bytes
    row.num_freed_bytes += freed_bytes


def write_missed(row: Row, other: Row) -> None:
    """Write into the instance's row what was mapped and unmapped that only another copy knows.

    What of it are weights is what both differ by: of an instance's processes on a device one maps
    and unmaps them.
    """
    mapped_bytes = max(other.num_mapped_bytes - row.num_mapped_bytes, 0)
    unmapped_bytes = max(other.num_unmapped_bytes - row.num_unmapped_bytes, 0)
    freed_bytes = max(other.num_freed_bytes - row.num_freed_bytes, unmapped_bytes)
    if mapped_bytes or freed_bytes:
        weights_bytes = other.weights_bytes - row.weights_bytes
        mapped_weights = min(max(weights_bytes, 0), mapped_bytes)
        unmapped_weights = min(max(-weights_bytes, 0), unmapped_bytes)
        write_weights(row, mapped_weights, unmapped_weights)
        mapped_bytes -= mapped_weights
        freed_bytes -= unmapped_weights
        unmapped_bytes -= unmapped_weights
        write_moves(row, mapped_bytes, unmapped_bytes, freed_bytes - unmapped_bytes)
        write_counts(row, other.used_bytes, other.cached_bytes, other.last_used_ns)
        row.taken_bytes = row.resident_bytes + row.promised_bytes + row.static_bytes


def write_stuck(row: Row, stuck_bytes: int) -> None:
    """Write into the instance's row what could not be unmapped: it is not on its way any more."""
    if stuck_bytes:
        row.coming_bytes = max(row.coming_bytes - stuck_bytes, 0)
        row.num_freed_bytes += stuck_bytes


def write_times(row: Row, map_times: CallTimes, unmap_times: CallTimes) -> None:
    """Add to the instance's row what maps and unmaps took."""
    if map_times is not NO_CALLS:
        map_times.write(row.map_times)
    if unmap_times is not NO_CALLS:
        unmap_times.write(row.unmap_times)


def write_counts(row: Row, used_bytes: int, cached_bytes: int, now_ns: int) -> None:
    """Write into the instance's row what its resident pages are for."""
    words, base = row.words, row.base
    resident_bytes = words[base + RESIDENT] - words[base + WEIGHTS]
    row.used_bytes = used_bytes = min(used_bytes, resident_bytes)
    row.cached_bytes = min(cached_bytes, resident_bytes - used_bytes)
    row.last_used_ns = now_ns


# Names no ask: an acknowledgement that does not end one.
NO_ASK = -1


def write_acknowledgement(row: Row, given: Acknowledgement) -> None:
    """Write an acknowledgement into the instance's row."""
    if given.num_asked in (None, row.num_asked):
        row.asked_bytes = row.owed_bytes = 0
    else:
        row.asked_bytes = max(row.asked_bytes - given.coming_bytes, 0)
        row.owed_bytes = min(row.owed_bytes, row.asked_bytes)
    already_bytes = row.num_freed_bytes - given.freed_bytes
    row.coming_bytes += max(given.coming_bytes - max(already_bytes, 0), 0)
    row.num_answered += 1


class PendingChanges:
    """The changes of a process's rows that wait for the lock. Any thread may call it.

    Whoever locks next writes them. In case nobody does, one writer at a time tries again and again:
    a thread that was started for it. Under one lock it ends, and changes are put off; so none of
    them is left to a writer that looks no more.

    Attributes:
        is_there: Whether there are any.
        has_writer: Whether a writer has been asked for, and has not ended.
    """

    def __init__(self) -> None:
        self.is_there = self.has_writer = False
        self._lock = threading.Lock()
        self._of_row: dict[RowKey, Changes] = {}

    def add(self, row: RowKey, changes: Changes) -> bool:
        """Put changes off; return whether the caller has to start a writer."""
        with self._lock:
            self.is_there = True
            self._of_row.setdefault(row, Changes()).add(changes)
            has_one, self.has_writer = self.has_writer, True
            return not has_one

    def keep_writer(self) -> bool:
        """Return whether the writer has to try again; if not, the next changes need another one."""
        with self._lock:
            self.has_writer = self.is_there
            return self.has_writer

    def drop_writer(self) -> None:
        """Note that the writer ends, whatever is left to write."""
        with self._lock:
            self.has_writer = False

    def take(self) -> dict[RowKey, Changes]:
        """Return all changes, and forget them: the caller writes them."""
        with self._lock:
            self.is_there = False
            taken, self._of_row = self._of_row, {}
            return taken
