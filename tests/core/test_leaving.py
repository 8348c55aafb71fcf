"""The files of a user's last engine are gone with its last process, whichever that is."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helpers.forked import exit_code_of_child
from helpers.waiting import PATIENCE_SECONDS, await_that

from kvcached_core.engine import leaving
from kvcached_core.ledger.opening import ledger_directory

SCRIPT = """
import multiprocessing, os, signal, sys
from pathlib import Path
from kvcached_core.engine.leaving import sweep_at_exit
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.opening import ledger_directory

folder = Path(sys.argv[1])

def core(ready, release):
    sweep_at_exit(folder, folder / "weights")
    ledger = Ledger(ledger_directory(folder) / "host.ledger", 1 << 30)
    ledger.register(name="a", engine="test")
    ready.set()
    release.wait()
"""

MAIN = """
def files():
    return sorted(os.listdir(folder))

if __name__ == "__main__":
    spawn = multiprocessing.get_context("spawn")
    ready, release = spawn.Event(), spawn.Event()
    child = spawn.Process(target=core, args=(ready, release), daemon=sys.argv[2] == "daemon")
    child.start()
    ready.wait()
    sweep_at_exit(folder, folder / "weights")
    assert "host.ledger" in files()
    END
    if not child.daemon and child.is_alive():  # set() would wait for a killed waiter for ever
        release.set()
"""

ENDS = {
    "parent": "pass",  # its engine core is a child that it waits for, or ends itself
    "core is killed": "os.kill(child.pid, signal.SIGKILL); child.join()",
    "core first": "release.set(); child.join()",
}


def run(tmp_path: Path, end: str, kind: str) -> list[Path]:
    script, folder = tmp_path / "engine.py", tmp_path / "kv"
    script.write_text(SCRIPT + MAIN.replace("END", end))
    done = subprocess.run(
        [sys.executable, str(script), str(folder), kind],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    return list(folder.iterdir())


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("kind", ["daemon", "joined"])
def test_nothing_is_left_however_an_engine_ends(tmp_path: Path, end: str, kind: str) -> None:
    assert run(tmp_path, ENDS[end], kind) == []


def test_a_forked_child_that_ends_removes_nothing(tmp_path: Path) -> None:
    end = "number = os.fork() or sys.exit(0); os.waitpid(number, 0); assert files()"
    assert run(tmp_path, end, "joined") == []


class Owner:
    """Something that a weak reference may name."""


def test_what_is_held_goes_with_its_owner_in_a_thread_of_its_own() -> None:
    owner, threads = Owner(), list[threading.Thread]()
    leaving.close_with(owner, lambda: threads.append(threading.current_thread()))
    assert threads == []
    del owner
    await_that(lambda: bool(threads))
    assert threads[0] is not threading.current_thread()


def test_what_was_closed_is_not_closed_again() -> None:
    owner, closed, threads = Owner(), list[str](), threading.active_count()
    close = leaving.close_with(owner, lambda: closed.append("once"))
    close()
    close()
    del owner
    assert (closed, threading.active_count()) == (["once"], threads)


def test_a_forked_child_that_drops_an_owner_closes_nothing() -> None:
    def drop() -> None:
        owners.clear()
        assert not closed.wait(0.2)

    owners, closed = [Owner()], threading.Event()
    leaving.close_with(owners[0], closed.set)
    assert exit_code_of_child(drop) == 0
    assert not closed.is_set()
    owners.clear()
    assert closed.wait(PATIENCE_SECONDS)


AT_EXIT = """
import sys
from kvcached_core.engine.leaving import close_with

class Owner: pass

owner = Owner()
close = close_with(owner, lambda: print("closed"), is_at_exit=sys.argv[1] == "True")
"""


@pytest.mark.parametrize("is_at_exit", [True, False])
def test_the_end_of_a_process_closes_what_says_so(*, is_at_exit: bool) -> None:
    command = [sys.executable, "-c", AT_EXIT, str(is_at_exit)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert (done.stdout, done.stderr) == ("closed\n" if is_at_exit else "", "")


HOLDER = """
import sys
from pathlib import Path
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.file import RowKey

ledger = Ledger(Path(sys.argv[1]), 1 << 30)
if len(sys.argv) > 2:
    ledger.join(RowKey(*map(int, sys.argv[2:])))
    print("joined", flush=True)
else:
    print(*ledger.register(name="a", engine="test"), flush=True)
sys.stdin.read()
"""


def start(path: Path, *words: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path), *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_the_workers_of_a_killed_engine_are_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ledger_directory(tmp_path / "kv")
    core = start(folder / "host.ledger")
    assert core.stdout is not None
    worker = start(folder / "host.ledger", *core.stdout.readline().split())
    assert worker.stdout is not None
    assert worker.stdout.readline() == "joined\n"
    core.kill()
    core.communicate()
    monkeypatch.setattr(leaving.time, "sleep", lambda _seconds: worker.communicate())
    leaving._sweep(folder, folder / "weights")
    worker.communicate()
    assert list(folder.iterdir()) == []
