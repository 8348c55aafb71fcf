"""Doing something whose processes and files are gone when it ends, however it ends.

Two processes look after each other. The one that was started waits for signals and makes no use of
them but to end the other, which is in a session of its own, does the work, and ends when the first
one dies. Both adopt what their descendants leave behind, so neither has to know what was started;
whoever is left ends all of it and removes the folder.
"""

import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from kvcached_core.errors import KVCachedError

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE_SECONDS = 60.0  # for the work to end after a signal; a second signal cuts it short
TRACKER_SECONDS = 3.0
GIVE_UP_SECONDS = 30.0
SIGNALLED = 128  # exit codes of what a signal ended start here
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
# Removes shared memory that others leave behind, and ends by itself when they are gone.
TRACKER = b"multiprocessing.resource_tracker"


def run_watched(work: Callable[[Path], int], *, prefix: str) -> int:
    """Do `work` in a folder of its own, and return its exit code.

    When this returns no process that the work started is left, and no folder. The same comes true
    soon after this process or the one that works is killed; only killing both leaves something.
    Signals that end a process end the work; the second one does not wait for it.

    Args:
        work: Is given the folder. An error of ours is printed as a message, others as a traceback.
        prefix: What the folder's name begins with.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    me = os.getpid()
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {*ENDING, signal.SIGCHLD})
    # The worker makes it: nobody would remove it if this process were killed before it forks.
    folder = Path(tempfile.gettempdir(), f"{prefix}{secrets.token_hex(8)}")
    try:
        _prctl(PR_SET_CHILD_SUBREAPER, 1)
        worker = os.fork()
        if worker == 0:
            _be_the_worker(work, folder, me, previous)
        return _wait_for(worker)
    finally:
        _leave_nothing(folder)
        _prctl(PR_SET_CHILD_SUBREAPER, 0)
        while signal.sigtimedwait(ENDING, 0):
            pass  # these came while we were ending anyway
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _wait_for(worker: int) -> int:
    deadline, ended_by = None, 0
    while True:
        wait = GRACE_SECONDS if deadline is None else max(deadline - time.monotonic(), 0.0)
        found = signal.sigtimedwait({*ENDING, signal.SIGCHLD}, wait)
        if found is None:
            if deadline is not None:
                os.kill(worker, signal.SIGKILL)
        elif found.si_signo != signal.SIGCHLD:
            os.kill(worker, signal.SIGKILL if ended_by else signal.SIGTERM)
            ended_by = ended_by or found.si_signo
            deadline = time.monotonic() + GRACE_SECONDS
        done, status = os.waitpid(worker, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return SIGNALLED + (ended_by or -code) if ended_by or code < 0 else code


def _be_the_worker(
    work: Callable[[Path], int], folder: Path, parent: int, mask: set[int | signal.Signals]
) -> NoReturn:
    code = 1
    try:
        os.setsid()
        _prctl(PR_SET_CHILD_SUBREAPER, 1)
        for number in ENDING:
            signal.signal(number, _end_once)
        _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            if os.getppid() == parent:  # else it died before we would have been told
                folder.mkdir(mode=0o700)
                code = work(folder)
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except KVCachedError as error:
        _say(f"kvcached: {error}\n")
    except BaseException:  # noqa: BLE001  nothing may go on behind this process
        _say(traceback.format_exc())
    finally:
        with contextlib.suppress(OSError):  # whoever reads it may be gone
            sys.stdout.flush()
        _leave_nothing(folder)
        os._exit(code)


def _end_once(number: int, _frame: object) -> None:
    for other in ENDING:
        signal.signal(other, signal.SIG_IGN)
    raise SystemExit(SIGNALLED + number)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        sys.stderr.write(text)
        sys.stderr.flush()


def _leave_nothing(folder: Path) -> None:
    start = time.monotonic()
    while found := list(_descendants()):
        waited = time.monotonic() - start
        if waited > GIVE_UP_SECONDS:
            _say(f"kvcached: these processes do not end: {found}\n")
            break
        for pid in found:
            if waited > TRACKER_SECONDS or not _is_tracker(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.01)
    shutil.rmtree(folder, ignore_errors=True)


def _descendants() -> Iterator[int]:
    """Yield the processes that this one started, or that were left to it, and theirs."""
    children: dict[int, list[int]] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            _name, _, rest = file.read_text(errors="replace").rpartition(")")
            children.setdefault(int(rest.split()[1]), []).append(int(file.parent.name))
    found = [os.getpid()]
    for pid in found:
        found += children.get(pid, [])
    yield from found[1:]


def _is_tracker(pid: int) -> bool:
    try:
        return TRACKER in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}, {value}): {os.strerror(number)}")
