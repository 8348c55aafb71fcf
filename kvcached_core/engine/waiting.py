"""Saying in the log that requests wait for memory, so that nobody looks for the cause elsewhere."""

import logging
import time
from collections.abc import Callable

from kvcached_core.ledger.file import RowKey
from kvcached_core.ledger.view import DeviceView
from kvcached_core.units import format_bytes

logger = logging.getLogger("kvcached")

# A request that waits no longer than this is a matter of load, not of what an operator set.
LOG_SECONDS = 10.0


class WaitingLog:
    """One line every ten seconds for as long as the requests of an instance wait for memory.

    The scheduler's thread calls it.

    Args:
        explain: Returns who holds the memory that is missing, for the line.
        clock: Returns seconds; for tests.
    """

    def __init__(
        self, explain: Callable[[], str], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._explain = explain
        self._clock = clock
        self._since: float | None = None
        self._said_at = 0.0

    def refused(self) -> None:
        """Note that a request was promised less than it needs."""
        now = self._clock()
        if self._since is None:
            self._since = self._said_at = now
        elif now - self._said_at >= LOG_SECONDS:
            self._said_at = now
            logger.warning(
                "kvcached: requests have been waiting for memory for %d s: %s",
                now - self._since,
                self._explain(),
            )

    def over(self) -> None:
        """Note that nothing waits any more."""
        self._since = None


def explain_wait(view: DeviceView, row: RowKey) -> str:
    """Return what an instance lacks on a device, and who holds the memory there, most first."""
    own = next((one for one in view.instances if one.row == row), None)
    lacking = format_bytes(own.waiting_bytes if own else 0)
    holders = sorted(view.instances, key=lambda one: -(one.resident_bytes + one.promised_bytes))
    terms = []
    for one in holders:
        kept = f", floor {format_bytes(one.floor_bytes)}" if one.floor_bytes else ""
        whose = "this one" if one is own else one.name
        held = format_bytes(one.resident_bytes + one.promised_bytes)
        terms.append(f"{whose} ({held}{kept})")
    limit = own.limit_bytes if own else None
    below = "" if limit is None else f", and its limit is {format_bytes(limit)}"
    return f"{lacking} are missing on {view.device}; it is held by {', '.join(terms)}{below}"
