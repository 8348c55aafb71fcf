"""A rank's weights in the ledger of its device: what of them is there, and memory for the rest."""

import contextlib
from collections.abc import Callable
from pathlib import Path

from kvcached_core.errors import LedgerError
from kvcached_core.ledger.bell import wake
from kvcached_core.ledger.expected import START_SECONDS
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.shortage import ask_peers
from kvcached_core.ledger.times import NO_CALLS
from kvcached_core.memory.arena import Arena
from kvcached_core.memory.patience import keep_trying
from kvcached_core.memory.seats import Seat

# How long a wake waits for memory that was promised; the engine goes on asking afterwards.
PATIENCE_SECONDS = 2.0


class WeightsRow:
    """The part of a row that is about weights. Before `join` nothing is told to anybody.

    Args:
        arena: Of the weights.
        num_resident: Returns how many pages there are now, of the size of the arena's.
    """

    def __init__(self, arena: Arena, num_resident: Callable[[], int]) -> None:
        self._arena = arena
        self._num_resident = num_resident
        self._ledger: Ledger | None = None
        self._seat: Seat | None = None
        self._num_reported = 0

    def join(self, seat: Seat) -> None:
        """From now on, tell the ledger of the rank's device what is resident.

        Raises:
            LedgerError: If the ledger cannot be used.
        """
        with contextlib.ExitStack() as undo:
            ledger = Ledger(Path(seat.ledger_path))
            undo.callback(ledger.close)
            ledger.join(seat.row)
            undo.pop_all()
        self._ledger, self._seat = ledger, seat
        self.report()
        self.expect(START_SECONDS)

    def report(self) -> None:
        """Tell the ledger what became of pages since it was told last; wake who waits for them."""
        if self._ledger is None or self._seat is None:
            return
        more = self._num_resident() - self._num_reported
        map_times, unmap_times = self._arena.maps.take(), self._arena.unmaps.take()
        if not more and map_times is unmap_times is NO_CALLS:
            return
        self._num_reported += more
        more_bytes = more * self._arena.geometry.page_bytes
        waiting = self._ledger.settle_weights(
            self._seat.row,
            mapped_bytes=max(more_bytes, 0),
            unmapped_bytes=max(-more_bytes, 0),
            map_times=map_times,
            unmap_times=unmap_times,
        )
        wake(self._ledger, waiting)

    def expect(self, seconds: float) -> None:
        """Say in how many seconds there is news of weights that are not offered yet."""
        if self._ledger is not None and self._seat is not None:
            with contextlib.suppress(LedgerError):  # the engine may have left
                self._ledger.expect_weights(self._seat.row, seconds)

    def with_patience(self, map_memory: Callable[[], None], missing_bytes: int) -> None:
        """Map memory; if there is none, ask the neighbours and try again for a while.

        Args:
            map_memory: Maps it, or raises.
            missing_bytes: What is missing in all.

        Raises:
            OutOfMemoryError: If it does not come.
            BackendError: As `map_memory` does.
        """
        ledger, seat = self._ledger, self._seat
        if ledger is None or seat is None:
            map_memory()
            return
        has_asked = False

        def ask() -> None:
            nonlocal has_asked
            has_asked = True
            self.report()
            ask_peers(ledger, seat.row, missing_bytes, is_static=True)

        try:
            keep_trying(map_memory, ask, PATIENCE_SECONDS)
        finally:
            if has_asked:
                ledger.clear_waiting(seat.row)

    def close(self) -> None:
        """Tell the ledger for the last time, and leave it."""
        with contextlib.ExitStack() as rest:
            if self._ledger is not None:
                rest.callback(self._ledger.close)
            with contextlib.suppress(LedgerError):  # the engine may have left, and with it the row
                self.report()
