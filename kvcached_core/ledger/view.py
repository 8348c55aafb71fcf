"""What the ledger knows at one moment, as values that stay as they are."""

import os
import time
from dataclasses import dataclass

from kvcached_core.ledger.activations import NO_ACTIVATIONS, Activations
from kvcached_core.ledger.file import (
    FILE_BYTES,
    NO_LIMIT,
    NUM_ROWS,
    PROGRAM,
    SEQUENCE,
    Header,
    Row,
    RowKey,
)
from kvcached_core.ledger.policy import Policy
from kvcached_core.ledger.times import NO_CALLS, CallTimes

# A writer is done in some microseconds, and others may follow at once: as long as they go on, no
# copy is like the one before. One that goes no further for longer than it may lack a core on a busy
# machine was stopped, or ended in the middle: what it wrote so far is what there is. That is 0.1 s,
# counted in looks: a clock also goes on while the machine stands still, and the writer with it.
_NUM_SAME_COPIES = 100
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 5e-5, 1e-3


@dataclass(frozen=True)
class InstanceView:
    """What the ledger knows of one instance at one moment; sizes in bytes.

    Attributes:
        row: Its row, and which of the instances that ever had the row it is.
        pid: The process that registered it, as that sees itself.
        pid_namespace: Where that number means something; 0 where nobody could tell.
        least_bytes: What one request of the largest size needs.
        token_bytes: What one token needs; 0 where nobody said so.
        weights_bytes: Weights that are resident, and that it can give and have back.
        weights_needed_bytes: What of these it needs to run; 0 where none yield.
        weights_offered_bytes: What of those that are resident may be asked for.
        weights_kept_until_ns: Until when only a higher priority is given some, by `time_ns`; where
            none are offered yet, until when there will be news of them.
        weights_wish: What somebody wishes of them, a `WeightsWish`.
        waking_since_ns: Since when it wakes, by `time_ns`, and before whom; 0 if it does not.
        activations: The times that it woke.
        map_times: What mapping a page took, of KV or of weights, on all ranks of the device.
        unmap_times: What unmapping a page took.
    """

    row: RowKey
    name: str
    engine: str
    pid: int
    pid_namespace: int
    limit_bytes: int | None
    floor_bytes: int
    priority: int
    page_bytes: int
    virtual_bytes: int
    least_bytes: int
    resident_bytes: int
    used_bytes: int
    cached_bytes: int
    idle_bytes: int
    promised_bytes: int
    static_bytes: int
    asked_bytes: int
    coming_bytes: int
    waiting_bytes: int
    num_mapped_bytes: int
    num_unmapped_bytes: int
    num_refused: int
    num_asked: int
    num_answered: int
    last_used_seconds: float
    map_times: CallTimes = NO_CALLS
    unmap_times: CallTimes = NO_CALLS
    token_bytes: int = 0
    weights_bytes: int = 0
    weights_needed_bytes: int = 0
    weights_offered_bytes: int = 0
    weights_kept_until_ns: int = 0
    weights_wish: int = 0
    waking_since_ns: int = 0
    activations: Activations = NO_ACTIVATIONS

    @property
    def is_waking(self) -> bool:
        """Whether its weights come back, or it waits for room for them."""
        return self.waking_since_ns != 0

    @property
    def is_program(self) -> bool:
        """Whether it is a program that is no engine; what it holds counts as weights."""
        return self.engine == PROGRAM

    @property
    def taken_bytes(self) -> int:
        """What it holds or is promised, and of a program what it has announced, too.

        What an engine announces may be allocated already, and in nobody's count.
        """
        announced_bytes = self.static_bytes if self.is_program else 0
        return self.resident_bytes + self.promised_bytes + announced_bytes

    @property
    def held_bytes(self) -> int:
        """What it holds for KV, or is promised: what limit and floor are about."""
        return self.resident_bytes - self.weights_bytes + self.promised_bytes

    @property
    def policy(self) -> Policy:
        """Its limit, floor and priority."""
        return Policy(self.limit_bytes, self.floor_bytes, self.priority)

    @property
    def index(self) -> int:
        """The number of its row."""
        return self.row.number

    @property
    def last_used_ns(self) -> int:
        """When its pages were for something else the last time."""
        return round(self.last_used_seconds * 1e9)

    @property
    def unmet_floor_bytes(self) -> int:
        """What is missing to its floor."""
        return max(self.floor_bytes - self.held_bytes, 0)

    @property
    def excess_bytes(self) -> int:
        """What it holds above its limit."""
        if self.limit_bytes is None:
            return 0
        return max(self.resident_bytes - self.weights_bytes - self.limit_bytes, 0)


@dataclass(frozen=True)
class DeviceView:
    """One device and its instances at one moment.

    Attributes:
        device: The name of its ledger: `host`, or the GPU's UUID.
        capacity_bytes: What the instances may hold together.
        instances: Who shares it.
        device_free_bytes: What nobody has allocated on it, where others than the instances use it
            too, as on a GPU; None where the capacity is all there is to know.
    """

    device: str
    capacity_bytes: int
    instances: tuple[InstanceView, ...]
    device_free_bytes: int | None = None

    @property
    def free_bytes(self) -> int:
        """Bytes that are neither resident nor promised, nor a program's, nor in other use."""
        taken = sum(view.taken_bytes for view in self.instances)
        free = self.capacity_bytes - taken
        if self.device_free_bytes is None:
            return free
        resident = sum(view.resident_bytes for view in self.instances)
        return min(free, self.device_free_bytes - (taken - resident))


def view_of(row: Row) -> InstanceView:
    """Return what a row says now."""
    resident = row.resident_bytes
    weights = min(row.weights_bytes, resident)
    used = min(row.used_bytes, resident - weights)
    cached = min(row.cached_bytes, resident - weights - used)
    return InstanceView(
        row=row.key,
        name=row.name,
        engine=row.engine,
        pid=row.pid,
        pid_namespace=row.pid_namespace,
        limit_bytes=None if row.limit_bytes == NO_LIMIT else row.limit_bytes,
        floor_bytes=row.floor_bytes,
        priority=row.priority,
        page_bytes=row.page_bytes,
        virtual_bytes=row.virtual_bytes,
        least_bytes=row.least_bytes,
        resident_bytes=resident,
        used_bytes=used,
        cached_bytes=cached,
        idle_bytes=resident - weights - used - cached,
        promised_bytes=row.promised_bytes,
        static_bytes=row.static_bytes,
        asked_bytes=row.asked_bytes,
        coming_bytes=row.coming_bytes,
        waiting_bytes=row.waiting_bytes,
        num_mapped_bytes=row.num_mapped_bytes,
        num_unmapped_bytes=row.num_unmapped_bytes,
        num_refused=row.num_refused,
        num_asked=row.num_asked,
        num_answered=row.num_answered,
        last_used_seconds=row.last_used_ns / 1e9,
        map_times=CallTimes.read(row.map_times),
        unmap_times=CallTimes.read(row.unmap_times),
        token_bytes=row.token_bytes,
        weights_bytes=weights,
        weights_needed_bytes=row.weights_needed_bytes,
        weights_offered_bytes=min(row.weights_offered_bytes, weights),
        weights_kept_until_ns=row.weights_kept_until_ns,
        weights_wish=row.weights_wish,
        waking_since_ns=row.waking_since_ns,
        activations=Activations.read(row.activations),
    )


def read_rows(fd: int) -> tuple[Header, list[Row]] | None:
    """Return a copy of a ledger's header and of the rows that have an instance.

    It takes no lock, so it holds nobody up, and nobody it: `None` is a file that was cut off.
    """
    copy, num_same, pause = b"", 0, _FIRST_PAUSE_SECONDS
    while num_same < _NUM_SAME_COPIES:
        before, copy = copy, os.pread(fd, FILE_BYTES, 0)
        if len(copy) < FILE_BYTES:
            return None
        words = memoryview(copy).cast("q")
        is_written = words[SEQUENCE] < 0
        if (
            not is_written
            and os.pread(fd, 8, 8 * SEQUENCE) == copy[8 * SEQUENCE : 8 * SEQUENCE + 8]
        ):
            break
        if copy == before:
            num_same += 1
        else:
            num_same, pause = 0, _FIRST_PAUSE_SECONDS
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
    header = Header(words)
    num_rows = min(max(header.num_rows, 0), NUM_ROWS)
    rows = [Row(words, index) for index in range(num_rows)]
    return header, [row for row in rows if row.is_live]
