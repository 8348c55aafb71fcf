"""An engine's processes: started in a session of their own, adopted, watched, ended to the last."""

import asyncio
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from kvcached_gateway.engines.sessions import Identity, kill_session, members
from kvcached_gateway.errors import AdoptionError

__all__ = ["EngineProcess", "Launch", "adopt", "launch", "start"]


class Child(Protocol):
    """What is needed of a child, as `subprocess.Popen` has it."""

    @property
    def pid(self) -> int:
        """Its id; it leads a session."""

    def poll(self) -> int | None:
        """Return how it ended, or None while it runs."""


# Starts a program as the leader of a session: from its words, all its variables, the folder that
# it runs in, and the descriptor that its output goes to.
Launch = Callable[[Sequence[str], Mapping[str, str], Path, int], Child]


def launch(words: Sequence[str], environ: Mapping[str, str], folder: Path, output: int) -> Child:
    """Start a program, as `Launch` says."""
    return subprocess.Popen(  # noqa: S603  the words come from the operator's file alone
        words,
        env=environ,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        start_new_session=True,
    )


class EngineProcess:
    """The processes of one engine.

    Args:
        identity: Its first process, the leader of its session.
        watch: A descriptor of that process (`pidfd_open`), which this object closes.
        child: The same process, where it is a child of ours.
    """

    def __init__(self, identity: Identity, watch: int, child: Child | None = None) -> None:
        self.identity = identity
        self._child = child
        self._ended = asyncio.Event()
        self._watch: int | None = watch
        asyncio.get_running_loop().add_reader(watch, self._on_end)

    @property
    def pid(self) -> int:
        """The id of its first process."""
        return self.identity.pid

    @property
    def is_running(self) -> bool:
        """Whether its first process has not ended."""
        return not self._ended.is_set()

    @property
    def exit_code(self) -> int | None:
        """How its first process ended; None while it runs, and where it was nobody's child."""
        return None if self._child is None else self._child.poll()

    async def ended(self) -> None:
        """Wait until its first process has ended; others of its session may still run."""
        await self._ended.wait()

    async def end(self, grace_seconds: float) -> None:
        """End all its processes: the first one politely, and after `grace_seconds` by force.

        Raises:
            TimeoutError: If one of them is still there, which only a hung driver does.
        """
        if self.is_running:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)
            await self._wait(grace_seconds)
        await kill_session(self.identity)
        await self._ended.wait()

    async def abort(self, grace_seconds: float) -> None:
        """End all its processes by force; those that write their stacks first do so.

        Raises:
            TimeoutError: If one of them is still there.
        """
        for pid in await asyncio.to_thread(members, self.identity):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGABRT)
        await self._wait(grace_seconds)
        await kill_session(self.identity)
        await self._ended.wait()

    async def _wait(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), seconds)

    def _on_end(self) -> None:
        self.forget()
        if self._child is not None:
            self._child.poll()
        self._ended.set()

    def forget(self) -> None:
        """Stop watching it, and leave it alone."""
        if self._watch is not None:
            asyncio.get_running_loop().remove_reader(self._watch)
            os.close(self._watch)
            self._watch = None


def start(
    words: Sequence[str],
    environ: Mapping[str, str],
    *,
    log: Path,
    folder: Path,
    launch: Launch = launch,
) -> EngineProcess:
    """Start a program in a session of its own; its output is appended to a log only we can read.

    Args:
        words: The program and its arguments.
        environ: All its variables.
        log: The file that standard output and errors go to.
        folder: Where it runs.
        launch: What starts it.

    Raises:
        OSError: If the program or the folder is not there.
    """
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        child = launch(words, environ, folder, output)
    finally:
        os.close(output)
    # Until it is polled its number is nobody else's, so this is not a race.
    return EngineProcess(Identity.of(child.pid), os.pidfd_open(child.pid), child)


def adopt(identity: Identity) -> EngineProcess:
    """Take over a process that somebody else started.

    Raises:
        AdoptionError: If it has ended, or its number is another process's now.
    """
    try:
        watch = os.pidfd_open(identity.pid)
    except OSError as error:
        raise AdoptionError(f"process {identity.pid} is gone: {error.strerror}") from error
    # Only now: a number that is looked at before may be another process's when it is opened.
    if not identity.is_running():
        os.close(watch)
        raise AdoptionError(f"the number {identity.pid} is another process's, or has ended")
    return EngineProcess(identity, watch)
