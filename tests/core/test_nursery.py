"""What is forked from a warm parent is as if it had been started."""

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.nursery import Nursery, NurseryError, WarmProcess
from helpers.processes import is_running
from helpers.waiting import await_that

NUMBERS = itertools.count()
REPORT = """
import json, os, sys
print(json.dumps({
    "environ": dict(os.environ), "words": sys.argv, "name": __name__, "pid": os.getpid(),
    "session": os.getsid(0), "directory": os.getcwd(), "is_warm": "colorsys" in sys.modules,
    "descriptors": sorted(map(int, os.listdir("/proc/self/fd")))[:-1],
}))
"""
SPAWN = """
import multiprocessing, os, sys
def report(queue):
    queue.put((os.getpid(), os.getppid(), os.environ["LATE"], "colorsys" in sys.modules))
if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    os.environ["LATE"] = "set before the spawn"
    child = context.Process(target=report, args=(queue,))
    child.start()
    seen = queue.get()
    child.join()
    print(seen == (child.pid, os.getpid(), "set before the spawn", True), child.exitcode)
"""
WAIT = """
import multiprocessing, pathlib, sys, time
def wait():
    pathlib.Path(sys.argv[1]).write_text("")
    time.sleep(600)
if __name__ == "__main__":
    child = multiprocessing.get_context("spawn").Process(target=wait)
    child.start()
    print(child.pid, flush=True)
    child.join()
"""


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery(sys.executable, ["colorsys"], os.environ | {"ONLY": "the parent's"})
    yield nursery
    nursery.close()


def start(
    nursery: Nursery, folder: Path, script: str, *arguments: str, **environ: str
) -> WarmProcess:
    """Run `script`; what it says is in the file `said`."""
    # A file of its own: a process that is slow reads it only when others have been started.
    file = folder / f"script-{next(NUMBERS)}.py"
    file.write_text(script)
    with (folder / "said").open("w") as said:
        descriptor = said.fileno()
        return nursery.start([str(file), *arguments], environ, descriptor, descriptor)


def said(folder: Path) -> str:
    return (folder / "said").read_text()


def test_a_process_that_nobody_asks_for_any_more_takes_no_other_with_it(
    nursery: Nursery, tmp_path: Path
) -> None:
    kept = start(nursery, tmp_path, "import time; time.sleep(600)")
    pid = start(nursery, tmp_path, "import time; time.sleep(600)").pid  # and it is forgotten
    os.kill(pid, signal.SIGKILL)
    await_that(lambda: not is_running(pid))
    assert start(nursery, tmp_path, "").wait(60) == 0
    assert kept.poll() is None
    kept.send_signal(signal.SIGKILL)
    assert kept.wait(60) == -signal.SIGKILL


def test_a_process_has_what_was_asked_for_and_nothing_of_its_parents(
    nursery: Nursery, tmp_path: Path
) -> None:
    process = start(nursery, tmp_path, REPORT, "word", WANTED="1")
    assert process.wait(60) == 0
    report = json.loads(said(tmp_path))
    assert report["environ"] == {"WANTED": "1"}
    (script,) = tmp_path.glob("script-*.py")
    assert report["words"] == [str(script), "word"]
    assert report["name"] == "__main__"
    assert report["pid"] == report["session"] == process.pid
    assert report["directory"] == str(Path.cwd())
    assert report["is_warm"]
    assert [each for each in report["descriptors"] if each < 3] == [0, 1, 2]
    assert len(report["descriptors"]) <= 5  # the folder that is listed, and the twin's channel


def test_a_module_is_run_as_the_interpreter_runs_it(nursery: Nursery, tmp_path: Path) -> None:
    with (tmp_path / "said").open("w") as output:
        words = ["-m", "json.tool", "--help"]
        assert nursery.start(words, {}, output.fileno(), output.fileno()).wait(60) == 0
    assert "usage: python -m json.tool" in said(tmp_path)


def test_code_is_run_as_the_interpreter_runs_it(nursery: Nursery, tmp_path: Path) -> None:
    code = "import sys; print(__name__, sys.argv, sys.modules['__main__'].__dict__ is globals())"
    with (tmp_path / "said").open("w") as output:
        words = ["-B", "-c", code, "word"]
        assert nursery.start(words, {}, output.fileno(), output.fileno()).wait(60) == 0
    assert said(tmp_path) == "__main__ ['-c', 'word'] True\n"


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("raise SystemExit(3)", 3),
        ("1 / 0", 1),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", -signal.SIGSEGV),
        ("import atexit, os; atexit.register(os._exit, 7)", 7),
    ],
)
def test_it_ends_as_it_would(nursery: Nursery, tmp_path: Path, script: str, code: int) -> None:
    process = start(nursery, tmp_path, script)
    assert process.wait(60) == process.poll() == process.returncode == code


def test_an_interrupt_reaches_it_as_an_exception(nursery: Nursery, tmp_path: Path) -> None:
    process = start(nursery, tmp_path, "import time\nprint(1, flush=True)\ntime.sleep(600)")
    await_that(lambda: said(tmp_path) != "")
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == -signal.SIGINT
    assert "KeyboardInterrupt" in said(tmp_path)


def test_what_it_spawns_is_forked_and_is_its_child(nursery: Nursery, tmp_path: Path) -> None:
    assert start(nursery, tmp_path, SPAWN).wait(60) == 0, said(tmp_path)
    assert said(tmp_path) == "True 0\n"


def test_its_group_is_killed_with_what_it_spawned(nursery: Nursery, tmp_path: Path) -> None:
    process = start(nursery, tmp_path, WAIT, str(tmp_path / "begun"))
    await_that((tmp_path / "begun").exists)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    await_that(lambda: not is_running(int(said(tmp_path))))


def test_a_killed_test_run_leaves_neither_the_parent_nor_a_process(tmp_path: Path) -> None:
    (tmp_path / "wait.py").write_text(WAIT)
    run = f"""
import os, sys, time
from helpers.nursery import Nursery
nursery = Nursery(sys.executable, [], os.environ)
process = nursery.start([{str(tmp_path / "wait.py")!r}, {str(tmp_path / "begun")!r}], {{}}, 1, 2)
print(nursery._process.pid, process.pid, flush=True)
time.sleep(600)
"""
    run_file = tmp_path / "run.py"
    run_file.write_text(run)
    tests = str(Path(__file__).parents[1])
    paths = os.pathsep.join([tests, *filter(None, [os.environ.get("PYTHONPATH")])])
    with (tmp_path / "said").open("w") as output:
        running: Any = subprocess.Popen(
            [sys.executable, str(run_file)], env=os.environ | {"PYTHONPATH": paths}, stdout=output
        )
    await_that((tmp_path / "begun").exists)
    await_that(lambda: len(said(tmp_path).split()) == 3)
    pids = [int(word) for word in said(tmp_path).split()]
    running.kill()
    running.wait()
    await_that(lambda: not any(map(is_running, pids)))


def test_a_parent_that_ended_is_said_and_nothing_waits_for_it(tmp_path: Path) -> None:
    nursery = Nursery(sys.executable, [], os.environ)
    process = start(nursery, tmp_path, "import time; time.sleep(600)")
    nursery._process.kill()
    with pytest.raises(NurseryError, match="the warm parent ended with -9"):
        process.wait(60)
    with pytest.raises(NurseryError, match="the warm parent ended"):
        start(nursery, tmp_path, "")
    await_that(lambda: not is_running(process.pid))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (
            "import threading as t; t.Thread(target=t.Event().wait, daemon=True).start()",
            "the warm parent has threads",
        ),
        ("raise OSError('no such engine')", "no such engine"),
    ],
)
def test_a_parent_that_cannot_fork_safely_is_refused_with_the_reason(
    tmp_path: Path, source: str, reason: str
) -> None:
    (tmp_path / "has_threads.py").write_text(source)
    with pytest.raises(NurseryError, match=reason):
        Nursery(sys.executable, ["has_threads"], os.environ | {"PYTHONPATH": str(tmp_path)})
