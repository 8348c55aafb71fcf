"""Room for what an engine that starts allocates first: found in turn, and waited for in patience.

Those that start stand in one line with those that wake, the oldest first, and only while their room
can come: who has to wait for others announces nothing, so that these get on.
"""

import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from kvcached_core.config import HOST, Config
from kvcached_core.ledger.bell import wake
from kvcached_core.ledger.expected import (
    START_SECONDS,
    Expected,
    Patience,
    num_starting,
    own_of,
)
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.policy import shares
from kvcached_core.ledger.shortage import (
    LOOK_SECONDS,
    Need,
    Shortage,
    ask_for_missing,
    ask_peers,
    explain,
    short_of,
)
from kvcached_core.memory.devices import Device
from kvcached_core.memory.host_memory import host_memory
from kvcached_core.memory.seats import open_ledgers
from kvcached_core.units import format_bytes
from kvcached_core.weights.host_pool import check_pool

logger = logging.getLogger("kvcached")

# Others' weights are soon there as a rule; after the first of these it is said what is waited for,
# and again after each of the second.
FIRST_LOG_SECONDS = 2.0
LOG_SECONDS = 10.0


@dataclass(frozen=True)
class Start:
    """What is known of an engine before it loads.

    Attributes:
        page_bytes: What its first page for KV takes on a rank, about.
        may_yield: Whether it will offer its weights.
    """

    page_bytes: int
    may_yield: bool


def open_with_room(devices: Collection[Device], config: Config) -> dict[Device, Ledger]:
    """Open the ledgers of an engine's devices; see `open_ledgers`.

    Raises:
        HostBudgetError: If one is the host, and copies and tiers leave no room for its pool.
    """
    for device in devices:
        if device.kind == HOST:
            check_pool(config, device.capacity_bytes(config), host_memory().usable_bytes)
    return open_ledgers(devices, config)


class StartLine:
    """One engine among those that start and wake, on all of its devices.

    Args:
        needs: What it allocates on each device, in an order that all engines keep.
        start: What is known of it.
        may_come: Returns whether a need is worth to be announced; None asks whether others would
            give it now.
    """

    def __init__(
        self, needs: Sequence[Need], start: Start, may_come: Callable[[Need], bool] | None = None
    ) -> None:
        self._needs = needs
        self._may_come = may_come or can_come
        self._start = start
        self._is_announced = False

    def look(self) -> bool:
        """Return whether there is room everywhere; then it is announced. Ask for it if it can come.

        Where several start, the first pages of all have to fit beside the weights that come now.
        Otherwise each could have its weights and wait for a page that no other gives.
        """
        if not all(self._may_come(need) for need in self._wanted()):
            self._retract()
            return False
        # Who was first until now may have entered since that look: it has the next pages.
        if not self._is_first() or ask_for_missing(self._wanted()):
            return False
        self.enter()
        return True

    def enter(self) -> None:
        """Announce it as something that comes now, whether or not there is room.

        Who is next in the line has to see it as one that starts as soon as it is not in front.
        """
        for need in self._needs:
            if self._start.may_yield:
                need.ledger.expect_weights(need.row, START_SECONDS)
            wake(need.ledger, need.ledger.announce(need.row, need.static_bytes))

    def _is_first(self) -> bool:
        """Announce the needs in their order, up to the first one that others stand in front of."""
        self._is_announced = True
        for need in self._needs:
            announced = need.ledger.announce(need.row, need.static_bytes, is_waking=True)
            wake(need.ledger, announced)
            if not need.ledger.is_first_waker(need.row):
                return False
        return True

    def _wanted(self) -> list[Need]:
        """Return the needs as of now, with the first pages of all that start."""
        wanted = []
        for need in self._needs:
            view = need.ledger.view()
            num_others = num_starting(view, own_of(view, need.row), time.time_ns())
            more_bytes = (1 + num_others) * self._start.page_bytes if num_others else 0
            wanted.append(Need(need.ledger, need.row, need.static_bytes + more_bytes))
        return wanted

    def _retract(self) -> None:
        for need in self._needs:
            if self._is_announced:
                wake(need.ledger, need.ledger.announce(need.row, 0))
            ask_peers(need.ledger, need.row, 0, is_static=True)  # so that rows of the dead go
        self._is_announced = False


def make_room_to_start(
    needs: Sequence[Need], rang: threading.Event, start: Start, patience: Patience
) -> Shortage | None:
    """Wait until there is room for what is needed, as long as there is something to wait for.

    Neighbours give idle pages, cached blocks and weights that they offer, never what their requests
    use. What is needed stays announced, also where there is no room: the start goes on.

    Args:
        needs: What is needed on each device.
        rang: Set by the rows' bells.
        start: What is known of the engine.
        patience: How long it waits.

    Returns:
        None if there is room on all devices, or what is missing on one of them.
    """
    line, log = StartLine(needs, start), StartLog()
    try:
        while True:
            rang.clear()
            if line.look():
                return None
            short = short_of(needs)
            if patience.is_over((need.ledger.view(), need.row) for need in short):
                shortage = short[0].shortage()
                line.enter()
                for need in short:
                    ask_peers(need.ledger, need.row, need.missing_bytes, is_static=True)
                return shortage
            log.waits(short, patience.waits_for)
            rang.wait(LOOK_SECONDS)
    finally:
        for need in needs:
            need.ledger.clear_waiting(need.row)


class StartLog:
    """Says what a start waits for, once in a while."""

    def __init__(self) -> None:
        self._started_at = time.monotonic()
        self._say_at = self._started_at + FIRST_LOG_SECONDS

    def waits(self, short: Sequence[Need], waits_for: Sequence[Expected]) -> None:
        """Note that it waits, and for whom."""
        now = time.monotonic()
        if now < self._say_at:
            return
        self._say_at = now + LOG_SECONDS
        logger.warning(
            "kvcached: this start has been waiting for memory for %d s: %s; %s",
            now - self._started_at,
            explain(short),
            waiting_for(waits_for),
        )


def waiting_for(waits_for: Sequence[Expected]) -> str:
    """Say whose weights a start waits for."""
    if not waits_for:
        return "nobody's weights are on their way"
    terms = (f"{one.name} ({format_bytes(one.num_bytes)}, {one.stage})" for one in waits_for)
    return "it waits for the weights of " + ", ".join(terms)


def can_come(need: Need) -> bool:
    """Return whether what is missing is what others would give now, if they were asked."""
    missing_bytes = need.missing_bytes
    if not missing_bytes:
        return True
    view = need.ledger.view()
    own = own_of(view, need.row)
    if own is None:
        return False
    peers = [one for one in view.instances if one is not own]
    missing_bytes -= sum(peer.coming_bytes for peer in peers)
    found = shares(
        own, peers, missing_bytes, is_waiting=False, is_static=True, now_ns=time.time_ns()
    )
    return sum(share.give_bytes for share in found) >= missing_bytes
