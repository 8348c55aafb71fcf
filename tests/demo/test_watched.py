"""What the demo starts is gone with it, however it ends; here it starts shells and not engines."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.waiting import PATIENCE_SECONDS, await_that

# Servers that will not end, one that hides in a session of its own behind a parent that is gone,
# and one that ends when it is asked.
WORK = """
import contextlib, os, subprocess, sys, time
from pathlib import Path
from kvcached_demo.watched import run_watched
from kvcached_core.errors import KVCachedError

mark, ended, how = sys.argv[1:]

def work(folder):
    if how == "code":
        return 3
    (folder / "kv").mkdir()
    (folder / "kv" / "host.ledger").write_bytes(b"rows")
    for script in (
        f"trap '' INT TERM HUP; sleep {mark} & wait; wait",
        f"setsid sh -c 'trap \\"\\" INT TERM HUP; sleep {mark} & sleep {mark}' & exit",
        f"exec sleep {mark}",
    ):
        subprocess.Popen(["sh", "-c", script], start_new_session=True)
    if how == "error":
        raise KVCachedError("it went wrong")
    try:
        print("ready", os.getpid(), flush=True)
        time.sleep(600)
    finally:
        if how == "slow":
            print("ending", flush=True)
            sys.stdin.read()  # until the test has done what it wants to do meanwhile
        Path(ended).touch()
    return 0

sys.exit(run_watched(work, prefix="kvcached-demo-"))
"""


class Demo:
    """A stand-in for the demo, in a session of its own, and what it leaves behind."""

    def __init__(self, scratch: Path, how: str = "") -> None:
        self.scratch = scratch
        self.ended = scratch.with_name("ended")
        # No other process sleeps as long.
        self.mark = f"{random.uniform(5e5, 6e5):.6f}"
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORK, self.mark, str(self.ended), how],
            env={**os.environ, "TMPDIR": str(scratch)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def clean(self) -> None:
        """End what a fault leaves behind."""
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process.partition(":")[0]), signal.SIGKILL)
        self.process.communicate()

    def worker(self) -> int:
        assert self.process.stdout
        ready, pid = self.process.stdout.readline().split()
        assert ready == "ready"
        await_that(lambda: len(self.processes()) == 8)
        return int(pid)

    def processes(self) -> list[str]:
        return list(self._named())

    def leaves_nothing(self) -> bool:
        return self.processes() == [] and list(self.scratch.iterdir()) == []

    def _named(self) -> Iterator[str]:
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                command = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if self.mark.encode() in command:
                yield f"{folder.name}: {command.decode()}"


Start = Callable[..., Demo]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    folder = tmp_path / "scratch"
    folder.mkdir()
    demos: list[Demo] = []

    def start_one(how: str = "") -> Demo:
        demos.append(Demo(folder, how))
        return demos[-1]

    yield start_one
    for demo in demos:
        demo.clean()


@pytest.mark.parametrize(
    "signals",
    [
        [signal.SIGINT],
        [signal.SIGTERM],
        [signal.SIGHUP],
        [signal.SIGINT, signal.SIGINT],
        [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, *[signal.SIGINT] * 5],
    ],
)
def test_signals_end_it_and_leave_nothing(start: Start, signals: list[signal.Signals]) -> None:
    demo = start()
    demo.worker()
    for number in signals:
        demo.process.send_signal(number)
    demo.process.communicate(timeout=PATIENCE_SECONDS)
    assert demo.leaves_nothing()
    # Which of two that wait is taken first is the kernel's choice.
    assert demo.process.returncode in {128 + number for number in signals}


def test_one_signal_lets_the_work_end_in_its_own_way(start: Start) -> None:
    demo = start()
    demo.worker()
    demo.process.send_signal(signal.SIGINT)
    demo.process.communicate(timeout=PATIENCE_SECONDS)
    assert demo.process.returncode == 128 + signal.SIGINT
    assert demo.ended.exists()


def test_a_second_signal_to_the_worker_does_not_interrupt_its_end(start: Start) -> None:
    demo = start("slow")
    worker = demo.worker()
    os.kill(worker, signal.SIGTERM)
    assert demo.process.stdout
    assert demo.process.stdout.readline() == "ending\n"
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(worker, number)
    demo.process.communicate(timeout=PATIENCE_SECONDS)  # closes what it reads
    assert demo.ended.exists()
    assert demo.leaves_nothing()


def test_killed_with_all_of_its_group_it_leaves_nothing(start: Start) -> None:
    demo = start()
    demo.worker()
    os.killpg(demo.process.pid, signal.SIGKILL)
    demo.process.communicate(timeout=PATIENCE_SECONDS)
    await_that(demo.leaves_nothing)


def test_a_worker_that_is_killed_leaves_nothing(start: Start) -> None:
    demo = start()
    os.kill(demo.worker(), signal.SIGKILL)
    demo.process.communicate(timeout=PATIENCE_SECONDS)
    assert demo.leaves_nothing()
    assert demo.process.returncode == 128 + signal.SIGKILL


def test_killed_before_the_worker_starts_it_leaves_nothing(tmp_path: Path) -> None:
    script = """
        import os, signal
        from kvcached_demo.watched import run_watched
        os.fork = lambda: os.kill(os.getpid(), signal.SIGKILL)
        run_watched(lambda folder: 0, prefix="demo-")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", ["code", "error"])
def test_its_exit_code_and_its_errors_are_those_of_the_work(start: Start, how: str) -> None:
    demo = start(how)
    _, errors = demo.process.communicate(timeout=PATIENCE_SECONDS)
    assert demo.leaves_nothing()
    expected = (3, "") if how == "code" else (1, "kvcached: it went wrong\n")
    assert (demo.process.returncode, errors) == expected


@pytest.mark.parametrize("seed", range(12))
def test_at_whatever_moment_it_ends_it_leaves_nothing(start: Start, seed: int) -> None:
    chance = random.Random(seed)
    demo = start()
    # From before it works to when everything runs: there is no event to wait for.
    time.sleep(chance.uniform(0.05, 0.6))
    for number in chance.choice([[signal.SIGKILL], [signal.SIGINT] * 2, [signal.SIGTERM]]):
        demo.process.send_signal(number)
    demo.process.communicate(timeout=PATIENCE_SECONDS)
    await_that(demo.leaves_nothing)
