"""The copies of `delayed_copier`: memmove in a thread, after a delay, where a gate lets them end.

What holds them up or spoils them is for the copiers of this process.
"""

import math
import threading
import time
import zlib
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import memmove, string_at
from dataclasses import dataclass, replace


class Gate:
    """Which copies may end: all, or those up to a job."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._last_job: float = math.inf

    def open_to(self, last_job: float) -> None:
        """Let jobs up to this one end, and no others."""
        with self._changed:
            self._last_job = last_job
            self._changed.notify_all()

    def wait(self, job_id: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: job_id <= self._last_job)


GATE = Gate()
LOADS_SPOILED = threading.Event()


@contextmanager
def copies_left_open() -> Iterator[Gate]:
    """Let no copy end in the block until somebody waits for one; of this process's copiers."""
    GATE.open_to(-1)
    try:
        yield GATE
    finally:
        GATE.open_to(math.inf)


@contextmanager
def loads_spoiled() -> Iterator[None]:
    """Load another layer's bytes in the block, which no sum tells; by this process's copiers."""
    LOADS_SPOILED.set()
    try:
        yield
    finally:
        LOADS_SPOILED.clear()


@dataclass(frozen=True)
class Piece:
    """One block of one layer, on the device and in the host tier."""

    key: tuple[int, int, int]  # chunk of the host tier, block in it, tensor
    device_address: int
    host_address: int
    num_bytes: int


@dataclass
class Job:
    """What is copied in one direction, with the sum that each piece has to have."""

    job_id: int
    pieces: list[Piece]
    sums: list[int | None]
    delay_seconds: float
    seconds: float = 0.0


def sum_of(address: int, num_bytes: int) -> int:
    """Return a sum of bytes in memory."""
    return zlib.adler32(string_at(address, num_bytes))


def from_other_layers(pieces: list[Piece]) -> list[Piece]:
    """Return the pieces of a load, each with the host's side of the next one of its size.

    That is another layer's where all have one size: attention reads the blocks of one layer in any
    order, so to swap those would change nothing.
    """
    by_size: dict[int, list[Piece]] = {}
    for piece in pieces:
        by_size.setdefault(piece.num_bytes, []).append(piece)
    return [
        replace(piece, key=other.key, host_address=other.host_address)
        for of_size in by_size.values()
        for piece, other in zip(of_size, [*of_size[1:], of_size[0]], strict=True)
    ]


class Direction:
    """Copies one job after the other, each a while after the one before or after it was given."""

    def __init__(self, *, is_store: bool) -> None:
        self._is_store = is_store
        self._jobs: deque[Job] = deque()
        self._done: list[Job] = []
        self._open: set[int] = set()
        self._changed = threading.Condition()
        self._is_closed = False
        self.fault = ""
        self.num_bytes = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        with self._changed:
            self._jobs.append(job)
            self._open.add(job.job_id)
            self._changed.notify_all()

    def take_done(self) -> list[Job]:
        with self._changed:
            done, self._done = self._done, []
        return done

    def wait(self, job_ids: set[int]) -> None:
        with self._changed:
            if not self._open.isdisjoint(job_ids):
                GATE.open_to(math.inf)
            self._changed.wait_for(lambda: self._open.isdisjoint(job_ids))

    def close(self) -> None:
        GATE.open_to(math.inf)
        with self._changed:
            self._changed.wait_for(lambda: not self._open)
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._is_closed)
                if self._is_closed:
                    return
                job = self._jobs.popleft()
            time.sleep(job.delay_seconds)  # a slow link: nothing is awaited
            GATE.wait(job.job_id)
            self._copy(job)
            with self._changed:
                self._open.discard(job.job_id)
                self._done.append(job)
                self._changed.notify_all()

    def _copy(self, job: Job) -> None:
        started = time.perf_counter()
        for piece, expected in zip(job.pieces, job.sums, strict=True):
            ends = piece.host_address, piece.device_address
            target, source = ends if self._is_store else ends[::-1]
            memmove(target, source, piece.num_bytes)
            self.num_bytes += piece.num_bytes
            if sum_of(target, piece.num_bytes) != expected:
                word = "store" if self._is_store else "load"
                self.fault = self.fault or f"{word} {job.job_id} copied other bytes: {piece}"
        job.seconds = time.perf_counter() - started
