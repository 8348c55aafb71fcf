"""Waiting for what another process does."""

import time
from collections.abc import Callable


def await_that(condition: Callable[[], bool], seconds: float) -> float:
    """Return after how long `condition` held; fail if it takes longer than `seconds`."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, "it did not come true in time"
        time.sleep(0.01)
    return time.monotonic() - start
