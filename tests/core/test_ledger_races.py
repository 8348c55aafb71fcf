"""Races over a ledger: one ledger, no byte promised twice, nothing of a stranger changed.

`KVCACHED_RACES=10000` runs each as often; without it they run often enough to find what is wrong
every time.
"""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
from helpers import forking_owner
from helpers.waiting import PATIENCE_SECONDS, await_that

from kvcached_core import control
from kvcached_core.config import HOST, read_config
from kvcached_core.engine.instance import Instance
from kvcached_core.errors import LedgerError
from kvcached_core.ledger.entry import SCHEDULER_SECONDS
from kvcached_core.ledger.file import RowKey
from kvcached_core.ledger.ledger import Ledger, sweep
from kvcached_core.ledger.lock import FileLock
from kvcached_core.ledger.opening import ledger_directory
from kvcached_core.memory.devices import Device
from kvcached_core.units import MIB

NUM_RACES = int(os.environ.get("KVCACHED_RACES", "200"))
PAGE = 16 * MIB
CAPACITY = 64 * PAGE
COMING_SECONDS = 0.3  # in which somebody who need not wait has come
BROKEN = threading.BrokenBarrierError
FORKING_OWNER = Path(forking_owner.__file__)

pytestmark = [
    pytest.mark.timeout(3600),
    pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning"),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return ledger_directory(tmp_path / "kv") / "host.ledger"


class Pair:
    """Two threads that do something at the same time, again and again."""

    def __init__(self) -> None:
        self.start = threading.Barrier(2)
        self.errors: list[BaseException] = []

    def race(self, *actions: Callable[[int], object]) -> None:
        """Do both for each number from 0 on; raise what one of them raised."""

        def run(action: Callable[[int], object]) -> None:
            try:
                for number in range(NUM_RACES):
                    self.start.wait(PATIENCE_SECONDS)
                    action(number)
            except BaseException as error:  # noqa: BLE001  raised below
                self.errors.append(error)
                self.start.abort()

        threads = [threading.Thread(target=run, args=(action,)) for action in actions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # One that raises breaks the barrier for the other one, which says nothing of its own.
        for error in sorted(self.errors, key=lambda error: isinstance(error, BROKEN)):
            raise error


def enter_and_leave(path: Path, name: str, promised: list[int], done: threading.Barrier) -> None:
    """Open the ledger, be promised what there is, and leave when the other one was as far."""
    with Ledger(path, CAPACITY) as ledger:
        row = ledger.register(name=name, engine="test")
        promised.append(ledger.promise(row, CAPACITY, PAGE))
        done.wait(PATIENCE_SECONDS)
        ledger.unregister(row)


def test_engines_that_open_while_others_leave_share_one_ledger(path: Path) -> None:
    promised: list[int] = []

    def check() -> None:
        assert sum(promised) == CAPACITY
        promised.clear()

    checked = threading.Barrier(2, action=check)

    def work(name: str) -> Callable[[int], None]:
        return lambda _number: enter_and_leave(path, name, promised, checked)

    Pair().race(work("a"), work("b"))
    assert list(path.parent.iterdir()) == []


def test_a_leave_and_an_open_at_any_two_moments_are_about_one_ledger(path: Path) -> None:
    with Ledger(path, CAPACITY) as first, Ledger(path, CAPACITY) as second:
        rows: dict[str, object] = {}

        def leave_and_come(number: int) -> None:
            row = first.register(name="first", engine="test")
            rows["first"] = first.promise(row, CAPACITY, PAGE)
            first.unregister(row)

        def come_and_leave(number: int) -> None:
            row = second.register(name="second", engine="test")
            granted = second.promise(row, CAPACITY, PAGE)
            with Ledger(path, CAPACITY) as third:
                other = third.register(name="third", engine="test")
                assert granted + third.promise(other, CAPACITY, PAGE) <= CAPACITY
                third.unregister(other)
            second.unregister(row)

        Pair().race(leave_and_come, come_and_leave)


def test_who_comes_while_the_last_one_removes_its_files_keeps_its_own(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    come = Coming(path)
    unlink = Path.unlink

    def unlink_slowly(gone: Path, missing_ok: bool = False) -> None:  # noqa: FBT001, FBT002  as it is
        unlink(gone, missing_ok=missing_ok)
        come.while_somebody_goes()

    with Ledger(path, CAPACITY) as first:
        row = first.register(name="first", engine="test")
        monkeypatch.setattr(Path, "unlink", unlink_slowly)
        first.unregister(row)
    come.check()


def test_who_comes_while_somebody_sweeps_keeps_its_files(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    come = Coming(path)
    path.with_suffix(".alive").touch(mode=0o600)
    exists = Path.exists

    def look_slowly(found: Path) -> bool:
        is_there = exists(found)
        come.while_somebody_goes()
        return is_there

    monkeypatch.setattr(Path, "exists", look_slowly)
    sweep(path.parent)
    come.check()


class Coming:
    """One that comes to a ledger while somebody else is in the middle of something."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._ledger: Ledger | None = None
        self._thread = threading.Thread(target=self._come)

    def while_somebody_goes(self) -> None:
        """Come, or be on the way, if nobody came before."""
        if self._thread.ident is None:
            self._thread.start()
            self._thread.join(COMING_SECONDS)

    def check(self) -> None:
        """Check that the next one finds it alive, and nothing damaged."""
        self._thread.join()
        assert self._ledger is not None
        with self._ledger, Ledger(self._path, CAPACITY) as last:
            assert [view.name for view in last.view().instances] == ["second"]
            names = {file.name for file in self._path.parent.iterdir()}
            assert names == {"host.ledger", "host.alive"}

    def _come(self) -> None:
        self._ledger = Ledger(self._path, CAPACITY)
        self._ledger.register(name="second", engine="test")


def come_and_go(path: Path, name: str) -> None:
    """Be in the ledger and leave it, often; whenever in it, it is the one at its path."""
    for _ in range(NUM_RACES):
        with Ledger(path, CAPACITY) as ledger:
            row = ledger.register(name=name, engine="test")
            assert os.path.samestat(os.fstat(ledger._fd), path.stat())
            granted = ledger.promise(row, CAPACITY, PAGE)
            seen = ledger.view().instances
            assert sum(view.promised_bytes for view in seen) <= CAPACITY
            ledger.cancel(row, granted)
            ledger.unregister(row)


def test_processes_that_come_and_go_are_always_in_the_same_ledger(path: Path) -> None:
    children = [
        multiprocessing.get_context("fork").Process(target=come_and_go, args=(path, name))
        for name in ("a", "b", "c")
    ]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert list(path.parent.iterdir()) == []


def report_for_ever(worker: Ledger, row: RowKey) -> None:
    """Report before, while and after the row changes hands."""
    while True:
        worker.settle(row, unmapped_bytes=4 * PAGE, used_bytes=0, cached_bytes=0)
        worker.cancel(row, 4 * PAGE)


def test_a_late_report_never_reaches_the_next_one_in_its_row(path: Path) -> None:
    with Ledger(path, CAPACITY) as ledger, Ledger(path) as worker:
        ledger.register(name="stays", engine="test")
        keys = {}
        ready = threading.Barrier(2)

        def change_hands(number: int) -> None:
            keys["old"] = ledger.register(name="old", engine="test")
            ready.wait(PATIENCE_SECONDS)
            ledger.unregister(keys["old"])
            new = ledger.register(name="new", engine="test")
            assert ledger.promise(new, 4 * PAGE, PAGE) == 4 * PAGE
            ledger.settle(new, mapped_bytes=4 * PAGE, used_bytes=4 * PAGE, cached_bytes=0)
            ready.wait(PATIENCE_SECONDS)
            seen = next(view for view in ledger.view().instances if view.row == new)
            assert (seen.resident_bytes, seen.used_bytes, seen.promised_bytes) == (
                *(4 * PAGE, 4 * PAGE, 0),
            )
            ledger.unregister(new)

        def report(number: int) -> None:
            ready.wait(PATIENCE_SECONDS)
            with pytest.raises(LedgerError, match="has left"):
                report_for_ever(worker, keys["old"])
            ready.wait(PATIENCE_SECONDS)

        Pair().race(change_hands, report)


def test_of_two_commands_at_once_both_hold(path: Path) -> None:
    with Ledger(path, CAPACITY) as ledger:
        row = ledger.register(name="a", engine="test", page_bytes=PAGE)

        def limit(number: int) -> None:
            text = str((1 + number % 40) * PAGE)
            control.set_limit("a", text, directory=path.parent, wait_seconds=0.0)

        def priority(number: int) -> None:
            control.set_priority("a", number % 50, directory=path.parent)

        numbers = count()

        def check() -> None:
            number = next(numbers)
            (seen,) = ledger.view().instances
            assert (seen.limit_bytes, seen.priority) == ((1 + number % 40) * PAGE, number % 50)

        done = threading.Barrier(2, action=check)

        def after(action: Callable[[int], None]) -> Callable[[int], None]:
            def both(number: int) -> None:
                action(number)
                done.wait(PATIENCE_SECONDS)

            return both

        Pair().race(after(limit), after(priority))
        assert ledger.view().instances[0].row == row


def test_engines_of_one_model_that_start_at_once_get_different_names(path: Path) -> None:
    config = read_config({"KVCACHED_DIR": str(path.parent)})
    pool = Device(HOST, "host", CAPACITY)
    started: list[Instance] = []

    def check() -> None:
        with Ledger(path) as ledger:
            seen = ledger.view().instances
        assert {view.name for view in seen} == {"model", "model-2"}
        assert sum(view.promised_bytes for view in seen) == CAPACITY

    done = threading.Barrier(2, action=check)

    def start(number: int) -> None:
        instance = Instance(
            [pool], config, name=None, default_name="model", engine="test", on_ring=lambda: None
        )
        instance.describe(page_bytes=PAGE, num_pages=64)
        instance.promise(64, is_urgent=False)
        started.append(instance)
        done.wait(PATIENCE_SECONDS)
        instance.close()

    Pair().race(start, start)


def test_a_fork_at_any_point_takes_nothing_from_its_parent(path: Path) -> None:
    """The child ends as a script would: it closes what it believes to have."""
    words = [sys.executable, "-W", "ignore", FORKING_OWNER, path, str(NUM_RACES)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def num_mapped_bytes(ledger: Ledger) -> int:
    return next(row.num_mapped_bytes for row in ledger.view().instances if row.name == "child")


def work_for_ever(path: Path, ready: int) -> None:
    """Do what an engine does, without a pause."""
    ledger = Ledger(path, CAPACITY)
    row = ledger.register(name="child", engine="test")
    os.write(ready, b"x")
    while True:
        granted = ledger.promise(row, 16 * PAGE, PAGE)
        ledger.settle(row, mapped_bytes=granted, used_bytes=granted, cached_bytes=0)
        ledger.ask_peers(row, 64 * PAGE)
        ledger.settle(row, unmapped_bytes=granted, used_bytes=0, cached_bytes=0)


def test_a_writer_killed_at_any_point_leaves_a_ledger_that_is_right(path: Path) -> None:
    with Ledger(path, CAPACITY) as ledger:
        row = ledger.register(name="stays", engine="test")
        ledger.promise(row, 8 * PAGE, PAGE)
        ledger.settle(row, mapped_bytes=8 * PAGE, used_bytes=0, cached_bytes=8 * PAGE)
        source = random.Random(2)
        for _number in range(NUM_RACES // 4):
            reader, writer = os.pipe()
            pid = os.fork()
            if pid == 0:
                signal.alarm(3000)
                work_for_ever(path, writer)
            assert os.read(reader, 1) == b"x"
            for _ in range(source.randrange(200)):
                ledger.room_bytes(row)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(reader)
            os.close(writer)
            ledger.cancel(row, 0)
            assert [view.name for view in ledger.view().instances] == ["stays"]
            ledger._look_around_ns = 0
            assert ledger.promise(row, CAPACITY, PAGE) == CAPACITY - 8 * PAGE
            ledger.cancel(row, CAPACITY)


def test_a_process_stopped_at_any_point_makes_a_scheduler_wait_once_at_most(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    acquire = FileLock.acquire

    def note(lock: FileLock, seconds: float) -> bool:
        if threading.current_thread() is threading.main_thread():
            waited.append(seconds)
        return acquire(lock, seconds)

    with Ledger(path, CAPACITY) as ledger:
        row = ledger.register(name="stays", engine="test")
        ready, ready_writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            signal.alarm(3000)
            work_for_ever(path, ready_writer)
        assert os.read(ready, 1) == b"x"
        monkeypatch.setattr(FileLock, "acquire", note)
        # A writer that goes no further is known to be stopped here.
        monkeypatch.setattr("kvcached_core.ledger.view._NUM_SAME_COPIES", 1)
        source = random.Random(3)
        num_held_up = 0
        for _ in range(NUM_RACES):
            for _ in range(source.randrange(50)):
                ledger.room_bytes(row)
            os.kill(pid, signal.SIGSTOP)
            os.waitpid(pid, os.WUNTRACED)
            waited.clear()
            for _ in range(3):
                granted = ledger.promise(row, 4 * PAGE, PAGE)
                ledger.cancel(row, granted)
            if ledger._is_held_up:
                num_held_up += 1
                assert sum(waited) <= SCHEDULER_SECONDS
            assert ledger.view().free_bytes >= 0
            before = num_mapped_bytes(ledger)
            os.kill(pid, signal.SIGCONT)
            await_that(lambda before=before: num_mapped_bytes(ledger) > before)  # type: ignore[misc]
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert num_held_up > 0
        ledger._look_around_ns = 0
        assert ledger.promise(row, CAPACITY, PAGE) == CAPACITY


def wake_and_sleep(ledger: Ledger, row: RowKey, num_pages: int) -> None:
    """Get the weights, when it is this one's turn and there is room, and give them back."""
    ledger.announce(row, num_pages * PAGE, is_waking=True)
    while not (ledger.is_first_waker(row) and ledger.free_bytes(row) >= num_pages * PAGE):
        ledger.ask_peers(row, num_pages * PAGE, is_static=True)
    for _ in range(num_pages // 4):
        ledger.settle_weights(row, mapped_bytes=4 * PAGE)
        assert ledger.view().free_bytes >= 0
    ledger.clear_waiting(row)
    ledger.settle_weights(row, unmapped_bytes=num_pages * PAGE)


def test_of_two_that_wake_at_once_beside_a_third_that_works_each_gets_its_turn(path: Path) -> None:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(3000)
        work_for_ever(path, writer)
    assert os.read(reader, 1) == b"x"
    try:
        with Ledger(path, CAPACITY) as first, Ledger(path, CAPACITY) as second:
            rows = {
                each: each.register(name=str(id(each)), engine="test") for each in (first, second)
            }
            for each, row in rows.items():
                each.describe_weights(row, 40 * PAGE)
            Pair().race(
                lambda number: number % 20 or wake_and_sleep(first, rows[first], 40),
                lambda number: number % 20 or wake_and_sleep(second, rows[second], 40),
            )
            # The last change may have been put off, as the third held the lock.
            await_that(lambda: not any(view.weights_bytes for view in first.view().instances))
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
