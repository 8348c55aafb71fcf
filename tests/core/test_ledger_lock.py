"""A process that is stopped with the lock stops nobody else, and nothing it held up is lost."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.waiting import PATIENCE_SECONDS, await_that

from kvcached_core import control
from kvcached_core.errors import LedgerBusyError, LedgerError
from kvcached_core.ledger import entry as ledger_entry
from kvcached_core.ledger.changes import Changes
from kvcached_core.ledger.file import SEQUENCE, RowKey
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.lock import FileLock
from kvcached_core.ledger.opening import ledger_directory
from kvcached_core.ledger.view import InstanceView
from kvcached_core.units import GIB, MIB

PAGE = 16 * MIB

HOLD = """
import sys, time
from pathlib import Path
from kvcached_core.ledger.ledger import Ledger
ledger = Ledger(Path(sys.argv[1]), 1 << 30)
ledger._enter_patiently()
print("held", flush=True)
sys.stdin.read()
"""


class StoppedHolder:
    """A process that has the lock and is stopped."""

    def __init__(self, path: Path) -> None:
        self.child = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.child.stdout is not None
        assert self.child.stdout.readline() == "held\n"
        self.child.send_signal(signal.SIGSTOP)

    def end(self) -> None:
        self.child.kill()
        self.child.communicate()


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(ledger_directory(tmp_path / "kv") / "host.ledger", GIB) as opened:
        yield opened


@pytest.fixture
def row(ledger: Ledger) -> RowKey:
    key = ledger.register(name="a", engine="test", page_bytes=PAGE)
    assert ledger.promise(key, 8 * PAGE, PAGE) == 8 * PAGE
    ledger.settle(key, mapped_bytes=4 * PAGE, used_bytes=PAGE, cached_bytes=PAGE)
    ledger.ask(key, 3 * PAGE)
    return key


@pytest.fixture
def holder(ledger: Ledger, row: RowKey) -> Iterator[StoppedHolder]:
    stopped = StoppedHolder(ledger.path)
    yield stopped
    stopped.end()


def only(ledger: Ledger) -> InstanceView:
    (seen,) = ledger.view().instances
    return seen


def test_a_scheduler_goes_on_and_is_promised_nothing(
    ledger: Ledger, row: RowKey, holder: StoppedHolder
) -> None:
    assert ledger.promise(row, PAGE, PAGE) == 0
    assert ledger.ask_peers(row, PAGE) == []
    assert ledger.wanted(row).asked_bytes == 3 * PAGE
    assert ledger.room_bytes(row) == ledger.free_bytes(row) == GIB - 8 * PAGE
    assert ledger.num_notices(row) == 1
    holder.end()
    assert ledger.promise(row, PAGE, PAGE) == PAGE


def test_a_scheduler_waits_once_and_not_again_until_it_had_the_lock(
    ledger: Ledger, row: RowKey, holder: StoppedHolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    acquire = FileLock.acquire

    def note(lock: FileLock, seconds: float) -> bool:
        waited.append(seconds)
        return acquire(lock, seconds)

    monkeypatch.setattr(FileLock, "acquire", note)
    for _ in range(3):
        ledger.promise(row, PAGE, PAGE)
    assert waited == [ledger_entry.SCHEDULER_SECONDS, 0.0, 0.0]
    assert ledger_entry.SCHEDULER_SECONDS <= 0.005
    holder.end()
    ledger.promise(row, PAGE, PAGE)
    ledger.promise(row, PAGE, PAGE)
    assert waited[-1] == ledger_entry.SCHEDULER_SECONDS


def test_waiting_for_a_thread_and_for_a_process_is_not_longer_than_for_one(
    ledger: Ledger, row: RowKey, holder: StoppedHolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, taken = ledger._lock, threading.Event()
    waited: list[float] = []
    clock = [0.0]

    def hold() -> None:
        with lock._threads:
            taken.set()
            await_that(lambda: bool(waiting))
            clock[0] += 3.0

    class Time:
        @staticmethod
        def monotonic() -> float:
            waiting.append(True)
            return clock[0]

        @staticmethod
        def sleep(seconds: float) -> None:
            waited.append(seconds)
            clock[0] += seconds

    waiting: list[bool] = []
    monkeypatch.setattr("kvcached_core.ledger.lock.time", Time)
    other = threading.Thread(target=hold)
    other.start()
    taken.wait(PATIENCE_SECONDS)
    assert not lock.acquire(3.5)
    other.join()
    assert sum(waited) == pytest.approx(0.5)


def test_what_could_not_be_written_is_written_when_the_lock_is_free(
    ledger: Ledger, row: RowKey, holder: StoppedHolder
) -> None:
    assert ledger.cancel(row, PAGE) == []
    ledger.acknowledge(row, 2 * PAGE, num_asked=ledger.wanted(row).num_asked)
    ledger.settle(row, mapped_bytes=PAGE, used_bytes=2 * PAGE, cached_bytes=PAGE)
    ledger.settle(row, unmapped_bytes=2 * PAGE, used_bytes=3 * PAGE, cached_bytes=0)
    ledger.settle(row, unneeded_bytes=PAGE, used_bytes=PAGE, cached_bytes=2 * PAGE)
    before = only(ledger)
    assert (before.promised_bytes, before.resident_bytes) == (4 * PAGE, 4 * PAGE)
    holder.end()
    ledger.promise(row, 0, PAGE)
    after = only(ledger)
    assert (after.promised_bytes, after.resident_bytes) == (PAGE, 3 * PAGE)
    assert (after.used_bytes, after.cached_bytes) == (PAGE, 2 * PAGE)
    assert (after.asked_bytes, after.coming_bytes) == (0, 0)


def test_weights_that_move_while_the_lock_is_held_are_counted_when_it_is_free(
    ledger: Ledger, row: RowKey, holder: StoppedHolder
) -> None:
    ledger.announce(row, 9 * PAGE, is_waking=True)
    assert not ledger.is_first_waker(row)
    ledger.settle_weights(row, mapped_bytes=8 * PAGE)
    ledger.settle_weights(row, unmapped_bytes=2 * PAGE)
    ledger.activated(row, 1)
    ledger.offer_weights(row, 6 * PAGE, 7)
    assert (only(ledger).weights_bytes, only(ledger).static_bytes) == (0, 0)
    holder.end()
    ledger.cancel(row, 0)
    seen = only(ledger)
    assert (seen.weights_bytes, seen.resident_bytes) == (6 * PAGE, 10 * PAGE)
    assert (seen.static_bytes, seen.activations.num) == (PAGE, 1)
    assert (seen.weights_offered_bytes, seen.weights_kept_until_ns) == (6 * PAGE, 7)


def test_who_wakes_does_not_wait_for_the_lock_and_is_first_when_it_is_written(
    ledger: Ledger, row: RowKey, holder: StoppedHolder
) -> None:
    ledger.announce(row, 9 * PAGE, is_waking=True)
    ledger.announce(row, 0)
    ledger.announce(row, 5 * PAGE, is_waking=True)
    assert not ledger.is_first_waker(row)
    holder.end()
    ledger.describe_weights(row, 5 * PAGE)
    assert ledger.is_first_waker(row)
    assert only(ledger).static_bytes == 5 * PAGE


def test_an_idle_engine_writes_it_without_being_called_again_each_time(
    ledger: Ledger, row: RowKey
) -> None:
    for left in (2 * PAGE, 0):
        holder = StoppedHolder(ledger.path)
        ledger.cancel(row, 2 * PAGE)
        holder.end()
        await_that(lambda left=left: only(ledger).promised_bytes == left)  # type: ignore[misc]
        await_that(lambda: not ledger._pending.has_writer)


def test_what_is_put_off_behind_a_writer_that_found_nothing_left_is_written_too(
    ledger: Ledger, row: RowKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[threading.Thread] = []

    def note(thread: threading.Thread) -> None:
        started.append(thread)

    with monkeypatch.context() as slow:
        slow.setattr(threading.Thread, "start", note)  # it gets no turn for now
        holder = StoppedHolder(ledger.path)
        ledger.cancel(row, PAGE)
        holder.end()
        ledger.promise(row, 0, PAGE)
    (late,) = started
    late.start()
    late.join(30)
    assert not late.is_alive()  # the ledger's next call had written it
    holder = StoppedHolder(ledger.path)
    ledger.acknowledge(row, 0, num_asked=ledger.wanted(row).num_asked)
    holder.end()
    await_that(lambda: only(ledger).asked_bytes == 0)


@pytest.mark.parametrize("error", [LedgerError("its lifetimes were replaced"), OSError("planted")])
def test_a_writer_that_an_error_ended_is_followed_by_another(
    ledger: Ledger, row: RowKey, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail() -> bool:
        raise error

    holder = StoppedHolder(ledger.path)
    with monkeypatch.context() as broken:
        broken.setattr(ledger, "_enter", fail)
        ledger._put_off(row, Changes(unpromised_bytes=PAGE))
        await_that(lambda: not ledger._pending.has_writer)
    assert ledger._pending.is_there
    ledger.cancel(row, PAGE)
    holder.end()
    await_that(lambda: only(ledger).promised_bytes == 2 * PAGE)


def test_an_answer_that_is_written_late_announces_only_what_is_still_to_come(
    ledger: Ledger, row: RowKey
) -> None:
    with Ledger(ledger.path) as worker:
        worker.join(row)
        assert worker._lock.acquire(1.0)
        ledger.acknowledge(row, 3 * PAGE, num_asked=ledger.wanted(row).num_asked)
        worker._lock.release()
        ledger._is_held_up = True
        worker.settle(row, unmapped_bytes=2 * PAGE, used_bytes=PAGE, cached_bytes=PAGE)
        await_that(lambda: not ledger._pending.is_there)
        assert only(ledger).coming_bytes <= 3 * PAGE
        worker.settle(row, unmapped_bytes=PAGE, used_bytes=PAGE, cached_bytes=0)
        assert only(ledger).coming_bytes == 0


def test_a_late_wish_to_wait_no_more_does_not_take_a_later_wish_back(
    ledger: Ledger, row: RowKey
) -> None:
    peer = ledger.register(name="b", engine="test")
    ledger.ask_peers(peer, PAGE)
    stopped = StoppedHolder(ledger.path)
    ledger.clear_waiting(peer)
    stopped.end()
    ledger.ask_peers(peer, 2 * PAGE)
    assert {seen.name: seen.waiting_bytes for seen in ledger.view().instances}["b"] == 2 * PAGE


def test_who_only_looks_needs_no_lock(
    ledger: Ledger, row: RowKey, holder: StoppedHolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    looking, acquire = threading.current_thread(), FileLock.acquire

    def refuse(lock: FileLock, seconds: float) -> bool:
        # The writer that a test before this one started may try once more.
        assert threading.current_thread() is not looking, "who only looks took the lock"
        return acquire(lock, seconds)

    monkeypatch.setattr(FileLock, "acquire", refuse)
    (device,) = control.devices(ledger.path.parent)
    assert [seen.name for seen in device.instances] == ["a"]
    assert device.instances[0].resident_bytes == 4 * PAGE


def test_who_may_wait_says_who_has_the_lock(
    ledger: Ledger, row: RowKey, holder: StoppedHolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_entry, "PATIENT_SECONDS", 0.05)
    with pytest.raises(
        LedgerBusyError, match=f"locked by process {holder.child.pid}, .*kill -CONT"
    ):
        ledger.change_policy(row, limit_bytes=PAGE)
    with pytest.raises(LedgerBusyError, match="kill -CONT"):
        ledger.register(name="b", engine="test")


def test_the_next_one_heals_what_a_dead_writer_left_unfinished(ledger: Ledger, row: RowKey) -> None:
    other = ledger.register(name="b", engine="test")
    holder = StoppedHolder(ledger.path)
    assert ledger._words[SEQUENCE] == -holder.child.pid
    ledger._rows[row.number].taken_bytes = 0
    holder.end()
    seen = ledger.num_notices(row)
    assert ledger.promise(other, GIB, PAGE) == GIB - 8 * PAGE
    assert ledger._words[SEQUENCE] > 0
    assert ledger.num_notices(row) > seen


def test_a_reader_waits_for_a_writer_and_not_for_one_that_does_not_go_on(
    ledger: Ledger, row: RowKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, written = ledger._words, ledger._rows[row.number]
    before = words[SEQUENCE]

    def finish(_seconds: float) -> None:
        written.used_bytes = 4 * PAGE
        written.cached_bytes = 0
        words[SEQUENCE] = before + 1

    with Ledger(ledger.path) as reader:
        words[SEQUENCE] = -1
        written.used_bytes = 2 * PAGE
        assert only(reader).used_bytes == 2 * PAGE  # that is all there is
        monkeypatch.setattr("kvcached_core.ledger.view.time.sleep", finish)
        assert (only(reader).used_bytes, only(reader).cached_bytes) == (4 * PAGE, 0)


def test_a_reader_that_copied_while_somebody_wrote_copies_again(
    ledger: Ledger, row: RowKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, pread = ledger._rows[row.number], os.pread
    changes = [True]

    def change_behind(fd: int, num_bytes: int, offset: int) -> bytes:
        copy = pread(fd, num_bytes, offset)
        if changes and num_bytes > 8:
            changes.pop()
            written.used_bytes = 4 * PAGE
            written.cached_bytes = 0
            ledger._words[SEQUENCE] += 1
        return copy

    with Ledger(ledger.path) as reader:
        monkeypatch.setattr("os.pread", change_behind)
        assert only(reader).used_bytes == 4 * PAGE


def test_a_reader_copies_as_long_as_others_go_on_writing(
    ledger: Ledger, row: RowKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, pread = ledger._rows[row.number], os.pread
    sizes = iter(range(200))

    def change_behind(fd: int, num_bytes: int, offset: int) -> bytes:
        if num_bytes > 8 and (size := next(sizes, None)) is not None:
            ledger._words[SEQUENCE] = -1
            written.used_bytes = size
            copy = pread(fd, num_bytes, offset)
            written.used_bytes = PAGE
            ledger._words[SEQUENCE] = size
            return copy
        return pread(fd, num_bytes, offset)

    with Ledger(ledger.path) as reader:
        monkeypatch.setattr("os.pread", change_behind)
        assert only(reader).used_bytes == PAGE


def test_a_reader_that_stood_still_with_a_writer_looks_again(
    ledger: Ledger, row: RowKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, num_pauses = ledger._words[SEQUENCE], count(1)
    ledger._words[SEQUENCE] = -1
    ledger._rows[row.number].used_bytes = 3 * PAGE

    def go_on_later(_seconds: float) -> None:
        if next(num_pauses) == 3:
            ledger._rows[row.number].used_bytes = 4 * PAGE
            ledger._words[SEQUENCE] = before + 1

    standing = SimpleNamespace(monotonic=count(0, 10).__next__, sleep=go_on_later)
    with Ledger(ledger.path) as reader:
        monkeypatch.setattr("kvcached_core.ledger.view.time", standing)
        assert only(reader).used_bytes == 4 * PAGE


def test_who_comes_next_heals_the_rows_of_others(
    ledger: Ledger, row: RowKey, holder: StoppedHolder
) -> None:
    holder.end()
    ledger._rows[row.number].taken_bytes = 0
    other = ledger.register(name="b", engine="test")
    assert ledger.free_bytes(other) == GIB - 8 * PAGE


def test_a_reader_sees_no_row_in_the_middle_of_a_change(
    ledger: Ledger, row: RowKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A busy machine may keep the writer for as long as one that was stopped.
    monkeypatch.setattr("kvcached_core.ledger.view._NUM_SAME_COPIES", 1_000_000)
    end = threading.Event()

    def change() -> None:
        with Ledger(ledger.path) as worker:
            worker.join(row)
            while not end.is_set():
                worker.settle(row, mapped_bytes=2 * PAGE, used_bytes=0, cached_bytes=6 * PAGE)
                worker.settle(row, unmapped_bytes=2 * PAGE, used_bytes=4 * PAGE, cached_bytes=0)
                worker.promise(row, 2 * PAGE, PAGE)

    writer = threading.Thread(target=change)
    writer.start()
    with Ledger(ledger.path) as reader:
        for _ in range(2_000):
            seen = only(reader)
            assert (seen.resident_bytes, seen.used_bytes, seen.cached_bytes) in (
                (4 * PAGE, PAGE, PAGE),
                (4 * PAGE, 4 * PAGE, 0),
                (6 * PAGE, 0, 6 * PAGE),
            )
    end.set()
    writer.join()


def test_a_device_is_asked_what_is_free_while_others_may_have_the_lock(ledger: Ledger) -> None:
    asked = []

    def free_bytes() -> int:
        asked.append(ledger._enter(0.0))
        ledger._exit()
        return GIB

    with Ledger(ledger.path, GIB, free_bytes) as gpu:
        row = gpu.register(name="gpu", engine="test")
        assert gpu.promise(row, PAGE, PAGE) == PAGE
        gpu.room_bytes(row)
        gpu.free_bytes(row)
        gpu.view()
    assert asked == [True] * 4


@pytest.mark.parametrize("what", ["mapped", "announced", "left"])
def test_what_was_allocated_since_a_device_was_asked_is_not_promised_again(
    ledger: Ledger, what: str
) -> None:
    neighbour = ledger.register(name="n", engine="test", static_bytes=5 * PAGE)
    ledger.promise(neighbour, 5 * PAGE, PAGE)
    free_pages = 20

    def allocate() -> None:
        if what == "mapped":
            ledger.settle(neighbour, mapped_bytes=5 * PAGE, used_bytes=0, cached_bytes=0)
        elif what == "announced":
            ledger.announce(neighbour, 0)
        else:
            ledger.unregister(neighbour)

    def free_bytes() -> int:
        seen = free_pages * PAGE
        allocate()
        return seen

    with Ledger(ledger.path, GIB, free_bytes) as gpu:
        row = gpu.register(name="gpu", engine="test")
        granted = gpu.promise(row, GIB, PAGE)
    assert granted == (15 if what == "left" else 10) * PAGE


class SignalError(Exception):
    """What a signal's handler raises."""


def test_a_signal_that_raises_anywhere_leaves_the_lock_free_for_the_next_call(
    ledger: Ledger, row: RowKey
) -> None:
    def interrupt(*_: object) -> None:
        raise SignalError

    before = signal.signal(signal.SIGALRM, interrupt)
    num_interrupts = 0
    try:
        for number in range(500):
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-5 + 1e-6 * (number % 50))
                for _ in range(1_000):
                    ledger.promise(row, 0, PAGE)
            except SignalError:
                num_interrupts += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert num_interrupts > 400
    ledger.promise(row, 0, PAGE)
    with Ledger(ledger.path) as other:
        assert other._enter(0.0)
        other._exit()
