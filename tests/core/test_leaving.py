"""The files of a user's last engine are gone with its last process, whichever that is."""

import subprocess
import sys
from pathlib import Path

import pytest

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
        timeout=120,
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
