"""Weights that will be offered, and how long an engine that starts waits for them.

An engine whose weights may yield says with each step of its start, and of its copy in host memory,
until when there will be news of it (`LedgerWeights.expect_weights`): the same word that says later
until when weights are kept. So who waits needs no other bound than that: what died has no row, what
failed says so, and what hangs lets the time pass.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from kvcached_core.ledger.file import RowKey
from kvcached_core.ledger.view import DeviceView, InstanceView

# From one step of a start to the next; compiling and capturing graphs take long. From one page of a
# copy to the next; taking and page-locking its memory, which comes first, takes long, too.
START_SECONDS = 300.0
COPY_SECONDS = 60.0


class Stage(StrEnum):
    """What becomes of weights before they are offered."""

    LOADING = "being loaded"
    COPYING = "being copied to host memory"
    KEPT = "just had back"


@dataclass(frozen=True)
class Expected:
    """Weights that will be offered.

    Attributes:
        row: Whose they are.
        name: What it is called.
        num_bytes: How many.
        stage: What becomes of them before.
        until_ns: When there is news of it, by `time_ns`.
    """

    row: RowKey
    name: str
    num_bytes: int
    stage: Stage
    until_ns: int


def expected(
    view: DeviceView, own: InstanceView | None, now_ns: int, *, has_loaded: bool = False
) -> Iterator[Expected]:
    """Yield what the peers of an engine that starts will offer.

    Who waits in a line itself is not waited for: it holds nothing yet, or waits for others.

    Args:
        view: The device.
        own: The row of the engine that starts.
        now_ns: The time, by `time_ns`.
        has_loaded: Whether it has its weights. Then it waits for nobody who has no page either:
            each of them would wait for the other's.
    """
    for peer in view.instances:
        until_ns, num_bytes = peer.weights_kept_until_ns, peer.weights_bytes + peer.static_bytes
        if peer is own or peer.is_waking or now_ns >= until_ns or not num_bytes:
            continue
        stage = Stage.COPYING
        if peer.weights_offered_bytes:
            if own is not None and own.priority > peer.priority:
                continue  # it has them for the asking
            num_bytes, stage = peer.weights_offered_bytes, Stage.KEPT
        elif not peer.held_bytes:
            if has_loaded:
                continue
            stage = Stage.LOADING
        yield Expected(peer.row, peer.name, num_bytes, stage, until_ns)


def num_starting(view: DeviceView, own: InstanceView | None, now_ns: int) -> int:
    """Return how many peers have room for their weights, and no page for their KV cache yet."""
    found = expected(view, own, now_ns)
    return sum(one.stage is Stage.LOADING for one in found)


class Patience:
    """How long one start waits: as long as something is on its way to it, and a while after.

    Args:
        seconds: How long after.
        has_loaded: See `expected`.
        clock: Returns seconds.
        clock_ns: Returns the time as the ledgers have it.

    Attributes:
        waits_for: What was on its way at the last look.
    """

    def __init__(
        self,
        seconds: float,
        *,
        has_loaded: bool = False,
        clock: Callable[[], float] = time.monotonic,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.waits_for: list[Expected] = []
        self._seconds = seconds
        self._has_loaded = has_loaded
        self._clock, self._clock_ns = clock, clock_ns
        self._over_at = clock() + seconds
        self._kept_until_ns: dict[RowKey, int] = {}

    def is_over(self, views: Iterable[tuple[DeviceView, RowKey]]) -> bool:
        """Look again; return whether it waits no more.

        Args:
            views: The devices on which something is missing, each with the own row.
        """
        seen = list(views)
        now_ns = self._clock_ns()  # after what it sees was written
        self.waits_for = [
            one
            for view, row in seen
            for one in expected(view, own_of(view, row), now_ns, has_loaded=self._has_loaded)
            if self._is_worth_it(one, now_ns)
        ]
        if self.waits_for:
            self._over_at = self._clock() + self._seconds
        return self._clock() >= self._over_at

    def _is_worth_it(self, one: Expected, now_ns: int) -> bool:
        until_ns = one.until_ns
        if one.stage is Stage.KEPT:  # one that comes back again and again is not waited for again
            until_ns = self._kept_until_ns.setdefault(one.row, until_ns)
        return now_ns < until_ns <= now_ns + round(START_SECONDS * 1e9)


def own_of(view: DeviceView, row: RowKey) -> InstanceView | None:
    """Return what a device says of a row; None if it does not have it."""
    return next((one for one in view.instances if one.row == row), None)
