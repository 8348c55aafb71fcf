"""Where memory is short: asking neighbours, and making room for what comes beside a KV cache."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from kvcached_core.ledger.bell import wake
from kvcached_core.ledger.file import RowKey
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.view import DeviceView
from kvcached_core.units import format_bytes

# How long neighbours may take. They ring when they gave something; what others than engines free on
# a device nobody tells, so who waits looks by itself too.
PATIENCE_SECONDS = 10.0
LOOK_SECONDS = 0.25


@dataclass(frozen=True)
class Shortage:
    """Why there is no room.

    Attributes:
        device: The name of the device's ledger.
        needed_bytes: What was announced there.
        missing_bytes: What of it is not free.
        holders: Names, and the bytes that each holds, is promised or has announced; most first.
    """

    device: str
    needed_bytes: int
    missing_bytes: int
    holders: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        held = ", ".join(f"{name} ({format_bytes(size)})" for name, size in self.holders)
        return (
            f"{format_bytes(self.missing_bytes)} of {format_bytes(self.needed_bytes)} are missing "
            f"on {self.device}; it is held by {held or 'nobody who says so'}"
        )


@dataclass(frozen=True)
class Need:
    """What the instance in a row is about to allocate on its device, in bytes."""

    ledger: Ledger
    row: RowKey
    static_bytes: int

    @property
    def missing_bytes(self) -> int:
        """What of it is not free."""
        return max(self.static_bytes - self.ledger.free_bytes(self.row), 0)

    def shortage(self) -> Shortage:
        """Return who holds what is missing."""
        view = self.ledger.view()
        held = {
            other.name: other.resident_bytes + other.promised_bytes + other.static_bytes
            for other in view.instances
            if other.row != self.row
        }
        held["weights and other programs"] = _beside_bytes(view)
        holders = sorted(held.items(), key=lambda item: -item[1])
        return Shortage(
            view.device,
            self.static_bytes,
            self.missing_bytes,
            tuple((name, size) for name, size in holders if size > 0),
        )


def short_of(needs: Sequence[Need]) -> list[Need]:
    """Return the needs of which something is missing; all, if nothing is any more."""
    return [need for need in needs if need.missing_bytes] or list(needs)


def explain(needs: Sequence[Need]) -> str:
    """Return what is missing on each device, and who holds it."""
    return "; ".join(str(need.shortage()) for need in needs)


def ask_peers(ledger: Ledger, row: RowKey, num_bytes: int, *, is_static: bool = False) -> None:
    """Ask the other instances for `num_bytes` in the name of `row`, and wake who can give."""
    wake(ledger, ledger.ask_peers(row, num_bytes, is_static=is_static))


def ask_for_missing(needs: Sequence[Need]) -> bool:
    """Ask the other instances for what is missing of each need; return whether anything is."""
    short = [(need, missing) for need in needs if (missing := need.missing_bytes)]
    for need, missing in short:
        ask_peers(need.ledger, need.row, missing, is_static=True)
    return bool(short)


def make_room(
    needs: Sequence[Need], rang: threading.Event, patience_seconds: float
) -> Shortage | None:
    """Announce what is needed, let neighbours give what is missing, and wait for it.

    They give idle pages and cached blocks, never what their requests use. The announcements stay,
    whatever comes out; nobody else is promised them.

    Args:
        needs: What is needed on each device.
        rang: Set by the rows' bells.
        patience_seconds: How long neighbours may take.

    Returns:
        None if there is room on all devices, or what is missing on one of them.
    """
    deadline = time.monotonic() + patience_seconds
    for need in needs:
        wake(need.ledger, need.ledger.announce(need.row, need.static_bytes))
    try:
        while True:
            rang.clear()
            short = [(need, missing) for need in needs if (missing := need.missing_bytes)]
            left_seconds = deadline - time.monotonic()
            if not short:
                return None
            if left_seconds <= 0:
                return short[0][0].shortage()
            for need, missing in short:
                ask_peers(need.ledger, need.row, missing, is_static=True)
            rang.wait(min(LOOK_SECONDS, left_seconds))
    finally:
        for need in needs:
            need.ledger.clear_waiting(need.row)


def _beside_bytes(view: DeviceView) -> int:
    """Return what is taken on a device beside all KV caches, or 0 where nobody can tell."""
    if view.device_free_bytes is None:
        return 0
    resident = sum(instance.resident_bytes for instance in view.instances)
    return view.capacity_bytes - max(view.device_free_bytes, 0) - resident
