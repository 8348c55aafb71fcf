"""Trying again for memory that was promised, and that somebody outside the ledger took."""

import logging
import time
from collections.abc import Callable

from kvcached_core.errors import OutOfMemoryError

logger = logging.getLogger("kvcached")

# It is tried again and again, after a pause that doubles from the first of these to the second, and
# said so once in the third.
FIRST_PAUSE_SECONDS = 0.01
LAST_PAUSE_SECONDS = 0.16
LOG_SECONDS = 1.0


def keep_trying(
    work: Callable[[], object], ask: Callable[[], object], patience_seconds: float
) -> None:
    """Return when `work` has found its memory.

    Args:
        work: Takes memory; what it raises but for want of it ends this.
        ask: Called after each try that found none: asks neighbours for it.
        patience_seconds: After how long not to try again.

    Raises:
        OutOfMemoryError: That of the last try.
    """
    started_at = time.monotonic()
    log_at, pause_seconds = started_at, FIRST_PAUSE_SECONDS
    while True:
        try:
            work()
        except OutOfMemoryError as error:
            now = time.monotonic()
            if now > started_at + patience_seconds:
                raise
            if now >= log_at:
                log_at = now + LOG_SECONDS
                logger.warning("kvcached: %s; asking the neighbours, trying again", error)
            ask()
            time.sleep(pause_seconds)
            pause_seconds = min(2 * pause_seconds, LAST_PAUSE_SECONDS)
        else:
            return
