"""`kvcached run`: the command, its signals, its end, and what is left of it in the ledger."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from helpers import allocating
from helpers.commands import KVCACHED
from helpers.processes import is_running
from helpers.waiting import PATIENCE_SECONDS, await_that

from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.opening import ledger_directory
from kvcached_core.ledger.view import InstanceView
from kvcached_core.program.processes import descendants
from kvcached_core.units import MIB

POOL, NEED = 512 * MIB, 64 * MIB
Start = Callable[..., "subprocess.Popen[str]"]
TELL = "import os, signal, sys, time\nsignal.signal({number}, lambda *_: sys.exit(9))\n"
TELL += "print(os.getpid(), flush=True)\ntime.sleep({seconds})\n"
# How long a command runs that nothing ends: no test sees it end by itself.
UNENDED_SECONDS = 10 * PATIENCE_SECONDS


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """The ledger of a pool in which an engine holds a page."""
    with Ledger(ledger_directory(tmp_path / "kv") / "host.ledger", POOL) as opened:
        row = opened.register(name="llama", engine="test", page_bytes=MIB)
        opened.promise(row, MIB, MIB)
        opened.settle(row, mapped_bytes=MIB, used_bytes=MIB, cached_bytes=0)
        yield opened


@pytest.fixture
def start(ledger: Ledger) -> Iterator[Start]:
    """Return a function that starts `kvcached run` with the words behind it."""
    started = list[subprocess.Popen[str]]()

    def start_one(*words: str, need: str = str(NEED), **environ: str) -> "subprocess.Popen[str]":
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            [KVCACHED, "run", "--need", need, *words],
            env={**os.environ, "KVCACHED_DIR": str(ledger.path.parent)} | environ,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            text=True,
        )
        started.append(process)
        return process

    yield start_one
    for process in started:
        if process.poll() is None:
            process.terminate()
        process.communicate()


def row(ledger: Ledger) -> InstanceView | None:
    return next((one for one in ledger.view().instances if one.is_program), None)


def line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def tell(number: signal.Signals) -> str:
    """Return a program that says its id, and ends by itself at this signal alone."""
    return TELL.format(number=int(number), seconds=UNENDED_SECONDS)


def test_its_room_shrinks_as_it_and_its_children_allocate_and_ends_with_it(
    ledger: Ledger, start: Start
) -> None:
    process = start(
        *("--name", "train", "--", sys.executable, allocating.__file__, str(NEED // 4), "2")
    )
    assert line(process) == "all"
    await_that(
        lambda: (
            (found := row(ledger)) is not None
            # Two of the three have no more than half; what they share is counted once.
            and found.resident_bytes > 5 * NEED // 8
        ),
    )
    found = row(ledger)
    assert found is not None
    assert found.name == "train"
    assert found.resident_bytes + found.static_bytes == NEED
    assert ledger.view().free_bytes == POOL - MIB - NEED
    children = descendants(process.pid)
    assert len(children) == 4  # the guard, the command, and its two in sessions of their own
    process.communicate("7\n")
    assert process.returncode == 7
    assert row(ledger) is None
    assert not any(map(is_running, children))


def test_output_and_exit_codes_are_the_commands(start: Start) -> None:
    process = start("--", "sh", "-c", "cat; echo wrong >&2; exit 3")
    assert process.communicate("hello\n") == ("hello\n", "wrong\n")
    assert process.returncode == 3


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("sh", "-c", "kill -USR1 $$"), 128 + signal.SIGUSR1, ""),
        (("no-such-command",), 127, "'no-such-command' cannot be started: No such file"),
        (("/",), 126, "'/' cannot be started: Permission denied"),
    ],
)
def test_a_command_that_does_not_end_by_itself_has_the_code_that_shells_give_it(
    start: Start, words: tuple[str, ...], code: int, text: str
) -> None:
    process = start("--", *words)
    _, errors = process.communicate()
    assert process.returncode == code
    assert text in errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_signals_are_passed_on(start: Start, number: signal.Signals) -> None:
    process = start("--", sys.executable, "-c", tell(number))
    assert line(process)
    process.send_signal(number)
    process.communicate()
    assert process.returncode == 9


def test_what_the_command_leaves_running_ends_with_it(start: Start) -> None:
    left = "(trap '' HUP; setsid sleep 100) >/dev/null 2>&1 & echo $!"
    process = start("--", "sh", "-c", left)
    pid = int(line(process))
    process.communicate()
    assert process.returncode == 0
    assert not is_running(pid)


@pytest.mark.parametrize("who", ["run", "guard"])
def test_after_a_kill_nothing_is_announced_and_nothing_runs_on(
    ledger: Ledger, start: Start, who: str
) -> None:
    process = start("--", sys.executable, "-c", tell(signal.SIGTERM))
    pid = int(line(process))
    guard = next(each for each in descendants(process.pid) if each != pid)
    found = row(ledger)
    assert found is not None
    assert found.static_bytes > 0
    os.kill(process.pid if who == "run" else guard, signal.SIGKILL)
    try:  # its pipes stay open for as long as what was left has them, so nothing reads these first
        code = process.wait(PATIENCE_SECONDS)
        await_that(lambda: not is_running(pid) and not is_running(guard))
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert code == (-signal.SIGKILL if who == "run" else 128 + signal.SIGKILL)
    assert row(ledger) is None
    assert ledger.promise(ledger.view().instances[0].row, POOL - MIB, MIB) == POOL - MIB


def test_without_room_the_command_is_not_started(ledger: Ledger, start: Start) -> None:
    process = start("--wait", "0", "--", "echo", "started", need=str(POOL))
    output, errors = process.communicate()
    assert (process.returncode, output) == (125, "")
    assert "there is no room for echo: 1 MiB of 512 MiB are missing on host" in errors
    assert "it is held by llama (1 MiB); 511 MiB could be had now" in errors
    assert row(ledger) is None


def test_a_signal_while_it_waits_ends_it(ledger: Ledger, start: Start) -> None:
    process = start("--wait", "100", "--", "echo", "started", need=str(POOL))
    await_that(lambda: row(ledger) is not None)
    process.terminate()
    output, _ = process.communicate()
    assert (process.returncode, output) == (128 + signal.SIGTERM, "")
    assert row(ledger) is None


@pytest.mark.parametrize(
    ("words", "need", "text"),
    [
        ((), "much", "--need='much' is not a size"),
        (("--name", "a b"), "1MiB", "--name='a b' is not allowed"),
        (("--device", "17"), "1MiB", "--device='17' is not there; there are host"),
    ],
)
def test_what_cannot_be_meant_is_said_before_anything_is_asked(
    start: Start, words: tuple[str, ...], need: str, text: str
) -> None:
    process = start(*words, "--", "true", need=need)
    _, errors = process.communicate()
    assert process.returncode == 125
    assert text in errors


def test_a_command_or_its_need_that_is_missing_is_wrong_usage(start: Start) -> None:
    process = start()
    process.communicate()
    assert process.returncode == 2


def test_the_command_has_its_own_options_and_only_the_device_that_is_named(start: Start) -> None:
    shown = "print(sys.argv[1:], os.environ['CUDA_VISIBLE_DEVICES'] == '')"
    code = f"import os, sys; {shown}"
    process = start(
        *("--device", "host", "--", sys.executable, "-c", code, "--need", "5"),
        CUDA_VISIBLE_DEVICES="3",
    )
    output, errors = process.communicate()
    assert output == "['--need', '5'] True\n", errors
