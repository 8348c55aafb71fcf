"""An instance's weights in its row: what is there, what may be asked for, and waking.

As with promises, nothing that a scheduler or a worker calls here waits for long: while the lock is
held for too long, what has to be written is kept, and written as soon as the lock can be had.
"""

import time
from enum import IntEnum

from kvcached_core.ledger.activations import Activations
from kvcached_core.ledger.changes import Changes
from kvcached_core.ledger.entry import LedgerEntry
from kvcached_core.ledger.file import HEADER_WORDS, NUM_USED_ROWS, ROW_WORDS, WAKING, RowKey
from kvcached_core.ledger.times import NO_CALLS, CallTimes
from kvcached_core.ledger.weight_changes import NO_WISH, WeightChanges, write_announcement


class WeightsWish(IntEnum):
    """What somebody outside wants of an instance's weights."""

    NONE = NO_WISH
    SLEEP = 1
    WAKE = 2


class LedgerWeights(LedgerEntry):
    """A ledger, as whoever maps, drops or waits for weights sees it."""

    def describe_weights(self, row: RowKey, needed_bytes: int) -> None:
        """Say how many bytes of weights that may yield an instance needs to run, all ranks here.

        It may wait for seconds.

        Raises:
            LedgerError: If the instance has left, or the lock is held for too long.
        """
        try:
            self._enter_patiently()
            found = self._row(row)
            found.weights_needed_bytes = needed_bytes
            self._keep(row, found.base)
        finally:
            self._exit()

    def settle_weights(
        self,
        row: RowKey,
        *,
        mapped_bytes: int = 0,
        unmapped_bytes: int = 0,
        map_times: CallTimes = NO_CALLS,
        unmap_times: CallTimes = NO_CALLS,
    ) -> list[RowKey]:
        """Record what a worker mapped and unmapped of the weights, and what that took.

        What is mapped was announced, as far as anything is; so it is taken from that. Limit and
        floor do not count weights. An instance that has all it needs does not wake any more.

        Returns:
            The rows that wait for memory and could have some, if some came free; ring their bells.
        """
        changes = Changes(
            map_times=map_times,
            unmap_times=unmap_times,
            weights=WeightChanges(mapped_bytes, unmapped_bytes),
        )
        return self._change(row, changes, is_freeing=bool(unmapped_bytes))

    def offer_weights(self, row: RowKey, offered_bytes: int, kept_until_ns: int = 0) -> None:
        """Say how much of the weights that are resident may be asked for.

        Args:
            row: The instance's row.
            offered_bytes: What idles, and can be had back; 0 while requests run.
            kept_until_ns: Until when (`time.time_ns`) only a higher priority is given some.
        """
        changes = WeightChanges(offer=(offered_bytes, kept_until_ns))
        self._change(row, Changes(weights=changes))

    def expect_weights(self, row: RowKey, seconds: float) -> None:
        """Say that weights will be offered, or that there is other news of them in some seconds.

        Until then an engine that starts waits for them. What is offered already stays as it is.

        Args:
            row: The instance's row.
            seconds: How long the next step towards that takes at most; 0 for weights that stay.
        """
        until_ns = time.time_ns() + round(seconds * 1e9) if seconds else 0
        self._change(row, Changes(weights=WeightChanges(expected_until_ns=until_ns)))

    def activated(self, row: RowKey, nanoseconds: int) -> None:
        """Count that all weights came back, and how long a request waited for it."""
        changes = WeightChanges(activations=Activations.one(nanoseconds))
        self._change(row, Changes(weights=changes))

    def announce(self, row: RowKey, static_bytes: int, *, is_waking: bool = False) -> list[RowKey]:
        """Say what the process is still about to allocate beside its KV cache, in bytes.

        It may wait for seconds, but not for an instance that wakes. What such a one announces while
        the lock is held for too long counts later: until then `is_first_waker` says no.

        An instance on several devices goes through them in an order that all keep, and announces on
        the next one only where it is the first to wake on those before: so two never wait for each
        other.

        Args:
            row: The instance's row.
            static_bytes: What it will allocate.
            is_waking: Whether it is for weights that come back. Otherwise the instance does not
                wake any more.

        Returns:
            The rows that wait for memory, if this leaves more than before; ring their bells.
        """
        if is_waking or row in self._wakers:
            (self._wakers.add if is_waking else self._wakers.discard)(row)
            changes = Changes(weights=WeightChanges(announced=(static_bytes, is_waking)))
            return self._change(row, changes, is_freeing=not is_waking, is_looking=True)
        try:
            self._enter_patiently()
            found = self._row(row)
            less_bytes = write_announcement(found, static_bytes, 0, is_waking=False)
            self._header.allocated_bytes += less_bytes
            self._keep(row, found.base)
            return self._waiting() if less_bytes else []
        finally:
            self._exit()

    def settle_program(
        self, row: RowKey, *, mapped_bytes: int, unmapped_bytes: int, announced_bytes: int
    ) -> list[RowKey]:
        """Say what a program has allocated and freed, and what of its room is left, in one change.

        What it holds counts as weights that are never offered. So it is at no moment counted twice,
        or not at all.

        Args:
            row: The program's row.
            mapped_bytes: What it holds more.
            unmapped_bytes: What it holds less.
            announced_bytes: What nobody else shall be promised beside that.

        Returns:
            The rows that wait for memory and could have some; ring their bells.
        """
        weights = WeightChanges(
            mapped_bytes, unmapped_bytes, announced=(announced_bytes + mapped_bytes, False)
        )
        return self._change(row, Changes(weights=weights), is_freeing=True, is_looking=True)

    def is_first_waker(self, row: RowKey) -> bool:
        """Return whether the instance has announced that it wakes, and none does that came before.

        It takes no lock.

        Raises:
            LedgerError: If the instance has left.
        """
        base = self._look(row)
        if base is None:
            return False
        words = self._words
        end = HEADER_WORDS + words[NUM_USED_ROWS] * ROW_WORDS
        since = words[base + WAKING]
        others = words[HEADER_WORDS + WAKING : end : ROW_WORDS]
        return bool(since) and not any(0 < other < since for other in others)

    def set_wish(self, row: RowKey, wish: WeightsWish) -> None:
        """Wish that an instance sleeps or wakes; may wait for seconds. Ring its bell.

        Raises:
            LedgerError: If the instance has left, or the lock is held for too long.
        """
        try:
            self._enter_patiently()
            found = self._row(row)
            found.weights_wish = wish
            found.num_notices += 1
            found.num_changes += 1
        finally:
            self._exit()

    def weights_wish(self, row: RowKey) -> WeightsWish:
        """Return what somebody wishes of the instance's weights. It takes no lock.

        Raises:
            LedgerError: If the instance has left.
        """
        base = self._look(row)
        found = self._rows[row.number].weights_wish if base is not None else NO_WISH
        return next((wish for wish in WeightsWish if wish == found), WeightsWish.NONE)

    def end_wish(self, row: RowKey, wish: WeightsWish) -> None:
        """Say that a wish is fulfilled, or will not be; a later one stays."""
        self._change(row, Changes(weights=WeightChanges(ended_wish=wish)))
