"""Running a program beside engines: room for it first, then the command, until all of it ended."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from kvcached_core.config import Config
from kvcached_core.engine.names import safe_name
from kvcached_core.memory.devices import Device
from kvcached_core.program import guard
from kvcached_core.program.processes import (
    adopt_orphans,
    descendants,
    end_all,
    reap_ended,
    shell_code,
)
from kvcached_core.program.room import Room

logger = logging.getLogger("kvcached")

DEFAULT_WAIT_SECONDS = 30.0
# Between two looks at what the program holds; and a look may take this part of a core's time.
LOOK_SECONDS, MAX_LOOK_SHARE = 0.1, 0.05


class Signals:
    """Signals that wait until somebody asks for them, in the thread that asks and all later ones.

    Threads that are started before would get them.
    """

    def __enter__(self) -> Self:
        self._before = signal.pthread_sigmask(signal.SIG_BLOCK, guard.BLOCKED)
        self.stopped_by: int | None = None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._before)

    def is_stopped(self) -> bool:
        """Return whether a signal came that ends who has started nothing yet."""
        found = signal.sigtimedwait(_ENDING, 0)
        if found is not None:
            self.stopped_by = found.si_signo
        return self.stopped_by is not None


_ENDING = frozenset({signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM})


def run(
    command: Sequence[str],
    devices: Sequence[Device],
    config: Config,
    *,
    need: str,
    name: str | None = None,
    priority: int | None = None,
    wait_seconds: float = DEFAULT_WAIT_SECONDS,
    environ: Mapping[str, str] | None = None,
) -> int:
    """Make room for a command, run it, and return its exit code; its room ends with it.

    Signals are passed on to it. Whatever it leaves running is ended. It has to be called by the
    main thread, before others are started.

    Args:
        command: The command and its arguments.
        devices: The devices that it will use.
        config: The settings.
        need: What it needs of each of them, as people write it.
        name: What it is called in the ledgers; None is its own name.
        priority: See `Room`; None is what the settings say.
        wait_seconds: How long neighbours may take to make room.
        environ: More variables for it.

    Raises:
        ConfigError: If the need is no size.
        NoRoomError: If there is no room; then nothing was started.
        LedgerError: If a ledger cannot be used.
        BackendError: If the driver does not know a device.
    """
    priority = config.priority if priority is None else priority
    name = name or safe_name(Path(command[0]).name)
    with (
        Signals() as signals,
        Room(devices, config, name=name, need=need, priority=priority) as room,
    ):
        if not room.make(wait_seconds, signals.is_stopped):
            return 128 + (signals.stopped_by or 0)
        room.begin()
        return _run(command, room, {**os.environ, **(environ or {})})


def _run(command: Sequence[str], room: Room, environ: Mapping[str, str]) -> int:
    adopt_orphans()  # those of a guard that is killed
    words = [sys.executable, "-P", "-m", guard.__name__, str(os.getpid()), *command]
    started = subprocess.Popen(words, env=environ, close_fds=False)  # noqa: S603  what was asked for
    try:
        return _watch(started, room)
    finally:
        with suppress(ProcessLookupError):
            started.terminate()
        end_all(os.getpid(), lambda: _reap(started))


def _watch(started: "subprocess.Popen[bytes]", room: Room) -> int:
    """Look what the program holds, and pass signals on, until it has ended."""
    look_at = 0.0
    while started.poll() is None:
        now = time.monotonic()
        if now >= look_at:
            room.look(descendants(started.pid))
            ended = time.monotonic()
            look_at = ended + max(LOOK_SECONDS, (ended - now) / MAX_LOOK_SHARE)
        number = guard.next_signal(max(look_at - time.monotonic(), 0.0))
        if number in guard.PASSED:
            started.send_signal(number)
    return shell_code(started.returncode)


def _reap(started: "subprocess.Popen[bytes]") -> None:
    if started.poll() is not None:  # its own code first, which whoever reaps takes away
        reap_ended()
