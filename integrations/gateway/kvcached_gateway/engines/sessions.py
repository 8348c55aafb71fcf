"""Sessions of processes: who is in one, by what the kernel says, and how one ends to the last.

An engine is many processes, and any of them may outlive the first one. So what ends is the session
that the first one leads, and it has ended when no process of it is left.
"""

import asyncio
import os
import signal
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kvcached_core.units import KIB

__all__ = ["MARK", "Identity", "kill_session", "members", "memory_bytes", "orphans"]

# The variable that says of which gateway's folder an engine is, whoever is its parent by now.
MARK = "GATEWAY_OF_ENGINE"

LOOK_SECONDS = 0.02
KILL_SECONDS = 20.0
STAT_STATE, STAT_SESSION, STAT_START = 0, 3, 19  # fields of /proc/PID/stat behind the name
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Identity:
    """Which process it is; no other one ever has the same three.

    Attributes:
        pid: Its id, as this machine sees it.
        start_ticks: When the kernel started it, in clock ticks since the boot.
        boot_id: The boot.
    """

    pid: int
    start_ticks: int
    boot_id: str

    @classmethod
    def of(cls, pid: int) -> "Identity":
        """Return that of a process that runs now.

        Raises:
            ProcessLookupError: If there is none of this id.
        """
        return cls(pid, int(_stat(pid)[STAT_START]), BOOT_ID.read_text().strip())

    def is_running(self) -> bool:
        """Return whether just this process runs, which a zombie does not."""
        try:
            return Identity.of(self.pid) == self and _stat(self.pid)[STAT_STATE] != "Z"
        except ProcessLookupError:
            return False


async def kill_session(identity: Identity) -> None:
    """Kill every process of the session that a process leads, or led, until none is left.

    Raises:
        TimeoutError: If one of them is still there.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + KILL_SECONDS
    while found := await asyncio.to_thread(members, identity):
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if loop.time() >= end:
            raise TimeoutError(f"processes {found} of engine {identity.pid} do not end")
        await asyncio.sleep(LOOK_SECONDS)


def orphans(folder: Path, known: Iterable[Identity]) -> list[Identity]:
    """Return the first processes of engines of a gateway's folder that no record knows.

    Args:
        folder: The folder, as engines of it have it in their variables.
        known: The engines of which there are records.
    """
    mark = f"{MARK}={folder}".encode()
    found, sessions = [], {identity.pid for identity in known}
    for pid in _pids():
        with suppress(OSError):
            session = int(_stat(pid)[STAT_SESSION])
            if session == pid and session not in sessions:
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                if mark in variables:
                    found.append(Identity.of(pid))
    return found


def memory_bytes(leaders: Iterable[Identity]) -> dict[Identity, int]:
    """Return the memory that only the processes of some sessions have, of those that still run.

    It is what is neither a file's nor shared; a page that a fork has not written counts in each.
    All processes of the machine are looked at once, which takes milliseconds: for a thread.
    """
    found = {leader.pid: leader for leader in leaders if leader.is_running()}
    held = dict.fromkeys(found.values(), 0)
    for pid in _pids() if found else []:
        with suppress(ProcessLookupError):
            leader = found.get(int(_stat(pid)[STAT_SESSION]))
            if leader is not None:
                held[leader] += _own_bytes(pid)
    return held


def _own_bytes(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except OSError:  # it has ended
        return 0
    line = next((line for line in text.splitlines() if line.startswith("RssAnon:")), "RssAnon: 0")
    return int(line.split()[1]) * KIB


def _pids() -> list[int]:
    names = os.listdir("/proc")  # noqa: PTH208  names are all that is needed
    return [int(name) for name in names if name.isdecimal()]


def members(identity: Identity) -> list[int]:
    """Return who of the session runs; zombies have no memory and are their parents' business.

    While one process of a session lives, the kernel gives its number to nobody else. So if the
    leader's number is another process's, the session is gone.
    """
    try:
        if Identity.of(identity.pid) != identity:
            return []
    except ProcessLookupError:
        pass
    found = []
    for pid in _pids():
        with suppress(ProcessLookupError):
            words = _stat(pid)
            if int(words[STAT_SESSION]) == identity.pid and words[STAT_STATE] != "Z":
                found.append(pid)
    return found


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat behind the name, which may hold anything.

    Raises:
        ProcessLookupError: If there is no such process.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError) as error:
        raise ProcessLookupError(f"there is no process {pid}") from error
    return text.rpartition(")")[2].split()
