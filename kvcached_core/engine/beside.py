"""What an engine allocates beside its KV cache, in the ledgers of its devices.

It is announced first, so that nobody else is promised it: what a start or a wake allocates, and
weights that come back. Weights that are there are offered while nothing runs on them.
"""

import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import TYPE_CHECKING

from kvcached_core.errors import LedgerBusyError
from kvcached_core.ledger.bell import wake
from kvcached_core.ledger.shortage import (
    Need,
    Shortage,
    ask_peers,
    explain,
    make_room,
    short_of,
)
from kvcached_core.ledger.weights import WeightsWish
from kvcached_core.memory.devices import Device

if TYPE_CHECKING:
    from kvcached_core.ledger.file import RowKey
    from kvcached_core.ledger.ledger import Ledger

# A scheduler that waits for room comes back in every turn of its loop, which shall not spin.
POLL_SECONDS = 0.001
# It looks when it is rung, or after this time: nobody tells it what others than engines free.
LOOK_SECONDS = 0.05

# How long an instance keeps weights that came back: for so many times what that took, or for this.
LEAST_KEPT_SECONDS = 10.0
NUM_KEPT_ACTIVATIONS = 30

# Bytes of each rank, in the order of ranks; or one number, where all have the same.
RankBytes = int | Sequence[int]


class Turn(IntEnum):
    """Whether an instance may have its weights back."""

    LATER = 0  # others come first, or the room cannot come while some are busy
    NEXT = 1  # neighbours make room
    NOW = 2


class Beside:
    """The announcements and the weights of one engine, on all of its devices.

    The scheduler's thread calls it.

    Args:
        ledgers: The ledgers, in an order that all engines keep.
        rows: The engine's row in each.
        devices: The device of each rank.
        rang: Set when somebody rings one of the rows' bells.
        kept_seconds: How long weights that came back are kept; None goes by what they took.
    """

    def __init__(
        self,
        ledgers: "Mapping[Device, Ledger]",
        rows: "Mapping[Device, RowKey]",
        devices: Sequence[Device],
        rang: threading.Event,
        kept_seconds: float | None,
    ) -> None:
        self._ledgers = ledgers
        self._rows = rows
        self._devices = devices
        self._rang = rang
        self._kept_seconds = kept_seconds
        self._kept_until_ns = 0
        self._turn = Turn.LATER
        self._look_at = 0.0
        self._is_waking = False  # as far as a ledger was told
        self._needs: list[Need] = []

    def announce(self, static_bytes: int) -> None:
        """Say what each rank is still about to allocate beside its KV cache, in bytes.

        Less than before leaves the rest to others, who are woken if they wait.
        """
        for need in self.needs_of(static_bytes):
            wake(need.ledger, need.ledger.announce(need.row, need.static_bytes))

    def make_room(self, static_bytes: int, patience_seconds: float) -> Shortage | None:
        """Announce what each rank is about to allocate beside its KV cache, and ask for it.

        Neighbours give idle pages and cached blocks, never what their requests use, and nobody is
        promised what is announced. Without room the announcement is taken back.

        Args:
            static_bytes: Bytes on each rank, such as weights that come back from sleep.
            patience_seconds: How long neighbours may take; the calling thread waits for them.

        Returns:
            None if there is room: call `announce(0)` when it is allocated. Otherwise what is
            missing, and who holds how much.
        """
        shortage = make_room(self.needs_of(static_bytes), self._rang, patience_seconds)
        if shortage is not None:
            self.announce(0)
        return shortage

    def describe_weights(self, needed_bytes: RankBytes) -> None:
        """Say how many bytes of weights each rank needs to run."""
        for need in self.needs_of(needed_bytes):
            need.ledger.describe_weights(need.row, need.static_bytes)

    def offer_weights(self, offered_bytes: RankBytes, *, is_kept: bool = True) -> None:
        """Say how many bytes of each rank's weights may be asked for; 0 while it runs.

        Args:
            offered_bytes: What may be asked for.
            is_kept: Whether only higher priorities get them for a while after they came back.
        """
        kept_until_ns = self._kept_until_ns if is_kept else 0
        for need in self.needs_of(offered_bytes):
            need.ledger.offer_weights(need.row, need.static_bytes, kept_until_ns)

    def ask_to_wake(self, missing_bytes: RankBytes) -> Turn:
        """Return whether each rank may have so many bytes of its weights back.

        Until it may, call this again and again: it waits for a millisecond in most of the calls, so
        that the caller's loop does not spin, and looks when a bell rang or some time has passed.
        With `NOW` the bytes are its own until `woke` or `stop_waking`.
        """
        now = time.monotonic()
        if now < self._look_at and not self._rang.wait(min(POLL_SECONDS, self._look_at - now)):
            return self._turn
        self._rang.clear()
        self._look_at = time.monotonic() + LOOK_SECONDS
        self._needs = self.needs_of(missing_bytes)
        try:
            self._turn = self._look()
        except LedgerBusyError:
            self._turn = Turn.LATER
        if self._turn is Turn.NOW:
            self._look_at = 0.0  # if others than engines take the room, it has to be looked for
        return self._turn

    def woke(self, waited_ns: int, took_ns: int) -> None:
        """Say that all weights are back; `stop_waking` comes behind it.

        Args:
            waited_ns: How long requests waited for them.
            took_ns: How long they took to come, once there was room.
        """
        kept_seconds = self._kept_seconds
        if kept_seconds is None:
            kept_seconds = max(LEAST_KEPT_SECONDS, NUM_KEPT_ACTIVATIONS * took_ns / 1e9)
        self._kept_until_ns = time.time_ns() + round(kept_seconds * 1e9)
        for device, ledger in self._ledgers.items():
            ledger.activated(self._rows[device], waited_ns)

    def stop_waking(self) -> None:
        """Announce nothing any more: all is back, or shall not come."""
        self._retract()
        self._turn, self._look_at = Turn.LATER, 0.0

    def wish(self) -> WeightsWish:
        """Return what somebody outside wants of the weights. Takes no lock."""
        wishes = (
            ledger.weights_wish(self._rows[device]) for device, ledger in self._ledgers.items()
        )
        return max(wishes, default=WeightsWish.NONE)

    def end_wish(self, wish: WeightsWish) -> None:
        """Say that a wish is fulfilled, or will not be."""
        for device, ledger in self._ledgers.items():
            ledger.end_wish(self._rows[device], wish)

    def explain_shortage(self) -> str:
        """Return what was missing at the last look, and who holds it."""
        return explain(short_of(self._needs))

    def needs_of(self, rank_bytes: RankBytes) -> list[Need]:
        """Return what bytes on each rank, all alike or each its own, are on each device."""
        if isinstance(rank_bytes, int):
            rank_bytes = [rank_bytes] * len(self._devices)
        sums: Counter[Device] = Counter()
        for device, num_bytes in zip(self._devices, rank_bytes, strict=True):
            sums[device] += num_bytes
        return [
            Need(ledger, self._rows[device], sums[device])
            for device, ledger in self._ledgers.items()
        ]

    def _look(self) -> Turn:
        if not all(can_come(need) for need in self._needs):
            # Memory that nobody can use would lie there, while those who hold the rest need it.
            self._retract()
            for need in self._needs:
                ask_peers(need.ledger, need.row, 0, is_static=True)  # so that rows of the dead go
            return Turn.LATER
        self._is_waking = True
        for need in self._needs:
            announced = need.ledger.announce(need.row, need.static_bytes, is_waking=True)
            wake(need.ledger, announced)
            if not need.ledger.is_first_waker(need.row):
                return Turn.LATER
        short = [(need, missing) for need in self._needs if (missing := need.missing_bytes)]
        for need, missing in short:
            ask_peers(need.ledger, need.row, missing, is_static=True)
        return Turn.NEXT if short else Turn.NOW

    def _retract(self) -> None:
        if self._is_waking:
            self._is_waking = False
            self.announce(0)
            for device, ledger in self._ledgers.items():
                ledger.clear_waiting(self._rows[device])


def can_come(need: Need) -> bool:
    """Return whether what an instance lacks is free, or may become free while nobody idles more.

    All that others hold for KV may: their requests end, or stop where they cannot go on. What is
    offered of their weights may, too, but not the weights of who has requests. If even that is not
    enough, an announcement would only keep those from ending that have to.
    """
    missing = need.missing_bytes
    if not missing:
        return True
    view, now_ns = need.ledger.view(), time.time_ns()
    own = next((one for one in view.instances if one.row == need.row), None)
    for peer in view.instances:
        if own is None or peer is own:
            continue
        # Page 0 never goes, nor what a floor guarantees.
        missing -= max(peer.held_bytes - max(peer.floor_bytes, peer.page_bytes), 0)
        if now_ns >= peer.weights_kept_until_ns or own.priority > peer.priority:
            missing -= peer.weights_offered_bytes
    return missing <= 0
