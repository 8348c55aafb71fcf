"""Waiting for what another process does."""

import time
from collections.abc import Callable

# How long a test waits for another process: one that passes takes none of it, on however loaded a
# machine, and one that hangs ends.
PATIENCE_SECONDS = 300.0


def await_that(condition: Callable[[], bool], seconds: float = PATIENCE_SECONDS) -> float:
    """Return after how long `condition` held; fail if it takes longer than `seconds`."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, "it did not come true in time"
        time.sleep(0.01)
    return time.monotonic() - start
