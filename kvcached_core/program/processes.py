"""Processes below one: who they are, what host memory they hold, and how all of them end.

It needs nothing but the kernel's files, so that a guard starts in no time.
"""

import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

# After SIGTERM, before SIGKILL.
GRACE_SECONDS = 5.0

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_LOOK_SECONDS = 0.02
_STATE, _PARENT = 0, 1  # fields of /proc/PID/stat behind the name
_KIB = 1024
# What the kernel could not drop: memory without a file behind it. Of what several processes share,
# each is counted its part.
_KEPT = ("Pss_Anon:", "Pss_Shmem:", "Private_Hugetlb:")
_KEPT_OF_STATUS = ("RssAnon:", "RssShmem:")

_libc = ctypes.CDLL(None)


def adopt_orphans() -> None:
    """Have every process below this one whose parent ends become this one's child."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def signal_at_parents_end(number: int) -> None:
    """Have the kernel send this process a signal when the thread that started it is gone."""
    _libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)


def descendants(pid: int) -> list[int]:
    """Return the processes below one that run; the dead that nobody has asked for do not."""
    children: dict[int, list[int]] = {}
    running = set[int]()
    for name in os.listdir("/proc"):  # noqa: PTH208  names are all that is needed
        if not name.isdecimal():
            continue
        with suppress(OSError):
            text = Path(f"/proc/{name}/stat").read_text(errors="replace")
            words = text.rpartition(")")[2].split()
            children.setdefault(int(words[_PARENT]), []).append(int(name))
            if words[_STATE] not in "ZX":
                running.add(int(name))
    found, unseen = list[int](), [pid]
    while unseen:
        below = children.get(unseen.pop(), [])
        unseen += below
        found += [each for each in below if each in running]
    return found


def host_bytes(pids: Iterable[int]) -> int:
    """Return the host memory that processes hold together; one that has ended holds none.

    That is memory without a file behind it, and what they share in memory; a page that several
    share is counted once.
    """
    return sum(map(_kept_bytes, pids))


def reap_ended() -> dict[int, int]:
    """Ask for every child that has ended; return the exit code of each, as Python has it."""
    codes: dict[int, int] = {}
    with suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            codes[found[0]] = os.waitstatus_to_exitcode(found[1])
    return codes


def shell_code(code: int) -> int:
    """Return what a shell says of an exit code that Python gave: 128 and the signal behind it."""
    return code if code >= 0 else 128 - code


def end_all(pid: int, reap: Callable[[], None], grace_seconds: float = GRACE_SECONDS) -> None:
    """End every process below one: SIGTERM, after some seconds SIGKILL, until none is left.

    Args:
        pid: The process; it adopts orphans.
        reap: Asks for the children that ended.
        grace_seconds: How many seconds.
    """
    deadline = time.monotonic() + grace_seconds
    told = set[int]()
    while True:
        reap()
        left = descendants(pid)
        if not left:
            reap()  # who ended just now
            return
        is_over = time.monotonic() >= deadline
        for each in left:
            if is_over or each not in told:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(each, signal.SIGKILL if is_over else signal.SIGTERM)
        told.update(left)
        time.sleep(_LOOK_SECONDS)


def _kept_bytes(pid: int) -> int:
    for file, words in (("smaps_rollup", _KEPT), ("status", _KEPT_OF_STATUS)):
        try:
            lines = Path(f"/proc/{pid}/{file}").read_text(errors="replace").splitlines()
        except OSError:  # it has ended, or is another user's: of these the second file says it
            continue
        found = [int(line.split()[1]) for line in lines if line.startswith(words)]
        if found:
            return sum(found) * _KIB
    return 0
