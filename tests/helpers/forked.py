"""What a forked child does, and how it ends."""

import os
import signal
from collections.abc import Callable


def exit_code_of_child(action: Callable[[], object]) -> int:
    """Return the exit code of a forked child in which `action` ran."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
