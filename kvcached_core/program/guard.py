"""Run as a module: starts a command, and ends it and all of its children with who asked for it.

    python -m kvcached_core.program.guard PARENT COMMAND...

`PARENT` is the process that starts this one. If that is killed, the kernel says so here. Signals
are passed on. The exit code is the command's, as a shell has it: 128 and the signal that ended it.
"""

import os
import signal
import sys

from kvcached_core.program.processes import (
    adopt_orphans,
    end_all,
    reap_ended,
    shell_code,
    signal_at_parents_end,
)

# Those that are passed on; whoever waits for them has them blocked.
PASSED = frozenset(
    {
        signal.SIGHUP,
        signal.SIGINT,
        signal.SIGQUIT,
        signal.SIGTERM,
        signal.SIGUSR1,
        signal.SIGUSR2,
        signal.SIGALRM,
        signal.SIGWINCH,
    }
)
BLOCKED = PASSED | {signal.SIGCHLD}
NOT_EXECUTABLE, NOT_FOUND = 126, 127  # as shells have them
_BY_KERNEL = 0x80  # in si_code: from the terminal, whose every process has it already
_IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)
_LOOK_SECONDS = 1.0


def next_signal(seconds: float) -> int | None:
    """Wait for a blocked signal; return one that is to be passed on, and SIGCHLD, or None."""
    found = signal.sigtimedwait(BLOCKED, seconds)
    if found is None or (found.si_signo in PASSED and found.si_code == _BY_KERNEL):
        return None
    return found.si_signo


def main(words: list[str]) -> int:
    """Start the command, wait for it, end what it leaves; return the exit code."""
    parent, *command = words
    adopt_orphans()
    signal_at_parents_end(signal.SIGCHLD)
    signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)
    try:
        pid = os.posix_spawnp(
            command[0], command, os.environ, setsigmask=(), setsigdef=_IGNORED_BY_PYTHON
        )
    except OSError as error:
        print(f"kvcached: {command[0]!r} cannot be started: {error.strerror}", file=sys.stderr)  # noqa: T201  it ends with it
        return NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE
    codes: dict[int, int] = {}

    def reap() -> None:
        codes.update(reap_ended())

    while pid not in codes and os.getppid() == int(parent):
        number = next_signal(_LOOK_SECONDS)
        reap()
        if number in PASSED and pid not in codes:
            os.kill(pid, number)
    end_all(os.getpid(), reap)
    return shell_code(codes[pid])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
