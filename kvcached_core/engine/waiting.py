"""Requests that wait for memory: when it is asked for again, and what the log says meanwhile."""

import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from kvcached_core.ledger.file import RowKey
from kvcached_core.ledger.view import DeviceView
from kvcached_core.units import format_bytes

if TYPE_CHECKING:
    from kvcached_core.ledger.ledger import Ledger
    from kvcached_core.memory.devices import Device

logger = logging.getLogger("kvcached")

# A request that waits no longer than this is a matter of load, not of what an operator set.
LOG_SECONDS = 10.0


# An engine that was refused asks again when it is rung, or after this time: nobody tells it what
# others than engines free on a device.
REFUSAL_SECONDS = 0.05


class Refusals:
    """What an instance was refused last, and so need not ask for again at once.

    The scheduler's thread calls it, and the bell's thread `forget`.

    Args:
        explain: Returns who holds the memory that is missing, for the log.
    """

    def __init__(self, explain: Callable[[], str]) -> None:
        self._log = WaitingLog(explain)
        self._num_pages = 0
        self._until = 0.0
        self._asked_until = 0.0

    def is_refused(self, num_pages: int) -> bool:
        """Return whether so many pages would be refused again: no fewer were, just now.

        Without a page it is a wish for spare ones, which are nobody's while a request waits.
        """
        is_as_large = num_pages >= self._num_pages or not num_pages
        return is_as_large and time.monotonic() < self._until

    def refuse(self, num_pages: int) -> None:
        """Note that so many pages were missing."""
        self._num_pages = num_pages
        self._until = time.monotonic() + REFUSAL_SECONDS
        self._log.refused()

    def may_ask(self) -> bool:
        """Return whether others have not been asked just now; then they are."""
        now = time.monotonic()
        if now < self._asked_until:
            return False
        self._asked_until = now + REFUSAL_SECONDS
        self._log.refused()
        return True

    def forget(self) -> None:
        """Ask again at once: somebody rang, so there may be memory."""
        self._until = self._asked_until = 0.0

    def end(self) -> None:
        """Note that nothing waits any more."""
        self._until = 0.0
        self._log.over()


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


def explain_waits(ledgers: "Mapping[Device, Ledger]", rows: "Mapping[Device, RowKey]") -> str:
    """Return `explain_wait` of an instance on each of its devices."""
    return "; ".join(explain_wait(ledgers[device].view(), row) for device, row in rows.items())


def explain_wait(view: DeviceView, row: RowKey) -> str:
    """Return what an instance lacks on a device, and who holds the memory there, most first."""
    own = next((one for one in view.instances if one.row == row), None)
    lacking = format_bytes(own.waiting_bytes if own else 0)
    holders = sorted(view.instances, key=lambda one: -one.taken_bytes)
    terms = []
    for one in holders:
        kept = f", floor {format_bytes(one.floor_bytes)}" if one.floor_bytes else ""
        whose = "this one" if one is own else one.name
        terms.append(f"{whose} ({format_bytes(one.taken_bytes)}{kept})")
    limit = own.limit_bytes if own else None
    below = "" if limit is None else f", and its limit is {format_bytes(limit)}"
    return f"{lacking} are missing on {view.device}; it is held by {', '.join(terms)}{below}"
