"""Promises, and what becomes of them: what a scheduler and the steps of its workers call.

A process may be stopped while it has the lock. What is called here waits for it at most
`SCHEDULER_SECONDS`. Then nothing is promised, and what has to be written is kept and written as
soon as the lock can be had.
"""

import time
from collections.abc import Callable
from pathlib import Path

from kvcached_core.ledger.changes import (
    Acknowledgement,
    Changes,
    write_counts,
    write_moves,
    write_stuck,
    write_times,
)
from kvcached_core.ledger.entry import LedgerEntry
from kvcached_core.ledger.file import ALLOCATED, FREED, PROMISED, WAITING, RowKey
from kvcached_core.ledger.room import free_bytes, room_bytes, waiting_bytes, younger_bytes
from kvcached_core.ledger.times import NO_CALLS, CallTimes

_DEVICE_INTERVAL_NS = 1_000_000


class LedgerPromises(LedgerEntry):
    """A ledger, as a scheduler and its workers see it: nothing here waits for long.

    Args:
        path: The file; its folder exists.
        capacity_bytes: What a new file says; None opens only a file that is there.
        free_bytes: Returns what may be mapped on the device right now, where others than ourselves
            use it too, as on a GPU; None where the capacity is all there is to know. It is never
            called under the lock.
    """

    def __init__(
        self,
        path: Path,
        capacity_bytes: int | None = None,
        free_bytes: Callable[[], int] | None = None,
    ) -> None:
        self._device_free_bytes = free_bytes
        self._ask_device_ns = self._recent_bytes = 0
        super().__init__(path, capacity_bytes)

    def promise(
        self,
        row: RowKey,
        num_bytes: int,
        unit_bytes: int,
        *,
        spare_bytes: int = 0,
        is_waiting: bool = False,
    ) -> int:
        """Promise up to `num_bytes`, in whole units, and return how many bytes it is.

        A promise never takes the instance over its limit, or all instances over the capacity. What
        is missing to another one's floor is promised only to a request that waits, and only as far
        as the owner does not wait for it. Nothing is promised while the lock is held for too long.

        Args:
            row: The instance's row.
            num_bytes: What it needs.
            unit_bytes: What a promise is a multiple of.
            spare_bytes: What it would like on top: granted only of what no other one waits for, and
                of no floor.
            is_waiting: Whether a request waits for `num_bytes`.

        Raises:
            LedgerError: If the instance has left.
        """
        is_looking_around = time.monotonic_ns() >= self._look_around_ns
        asked = self._ask_device()
        try:
            if not self._enter(is_looking_around=is_looking_around):
                return 0
            base = self._base(row)
            words = self._words
            device_free_bytes = self._still_free_bytes(asked)
            room = unborrowed = room_bytes(words, self._rows, base, device_free_bytes)
            if is_waiting and room < num_bytes:
                room = room_bytes(words, self._rows, base, device_free_bytes, is_waiting=True)
            granted = num_bytes if room >= num_bytes else max(room // unit_bytes * unit_bytes, 0)
            if spare_bytes:
                left = unborrowed - granted - (waiting_bytes(words) - words[base + WAITING])
                granted += min(spare_bytes, max(left // unit_bytes * unit_bytes, 0))
            words[base + PROMISED] += granted
            if granted < num_bytes:
                self._rows[row.number].num_refused += 1
            elif granted:
                words[base + WAITING] = 0
            self._keep(row, base)
            return granted
        finally:
            self._exit()

    def cancel(self, row: RowKey, num_bytes: int) -> list[RowKey]:
        """Take back `num_bytes` of a promise that were not mapped.

        Returns:
            The other rows that wait for memory and could have some; ring their bells.
        """
        try:
            if not self._enter():
                self._put_off(row, Changes(unpromised_bytes=num_bytes))
                return []
            base, words = self._base(row), self._words
            words[base + PROMISED] = max(words[base + PROMISED] - num_bytes, 0)
            self._keep(row, base)
            waiting = self._waiting()
            return [other for other in waiting if other != row] if waiting else waiting
        finally:
            self._exit()

    def settle(
        self,
        row: RowKey,
        *,
        mapped_bytes: int = 0,
        unmapped_bytes: int = 0,
        unneeded_bytes: int = 0,
        stuck_bytes: int = 0,
        used_bytes: int,
        cached_bytes: int,
        map_times: CallTimes = NO_CALLS,
        unmap_times: CallTimes = NO_CALLS,
    ) -> list[RowKey]:
        """Record what a worker mapped and unmapped, and what its resident pages are for.

        A promise shrinks by what was mapped and by what turned out not to be needed. Everything
        else that is resident is idle, so resident = used + cached + idle holds at every moment
        anybody can see. What is stuck could not be unmapped: nobody shall count on it.

        Returns:
            The rows that wait for memory and could have some, if some came free; ring their bells.
        """
        now_ns = time.time_ns()
        try:
            if not self._enter():
                changes = Changes(0, mapped_bytes, unmapped_bytes, unneeded_bytes, stuck_bytes)
                changes.counts = used_bytes, cached_bytes
                changes.map_times, changes.unmap_times = map_times, unmap_times
                self._put_off(row, changes)
                return []
            base, found = self._base(row), self._rows[row.number]
            if mapped_bytes or unmapped_bytes or unneeded_bytes:
                write_moves(found, mapped_bytes, unmapped_bytes, unneeded_bytes)
                self._words[ALLOCATED] += mapped_bytes
            write_stuck(found, stuck_bytes)
            write_times(found, map_times, unmap_times)
            write_counts(found, used_bytes, cached_bytes, now_ns)
            self._keep(row, base)
            return self._waiting() if unmapped_bytes or unneeded_bytes else []
        finally:
            self._exit()

    def acknowledge(
        self, row: RowKey, coming_bytes: int = 0, *, num_asked: int | None = None
    ) -> None:
        """Say that this instance gives what it can.

        Args:
            row: Its row.
            coming_bytes: What its workers are about to unmap.
            num_asked: Which ask this answers; of a later one the rest stays. None answers all,
                and with `NO_ASK` the rest of every ask stays.
        """
        freed_bytes = self._words[self._rows[row.number].base + FREED] if self._is_intact() else 0
        given = Acknowledgement(coming_bytes, num_asked, freed_bytes)
        self._change(row, Changes(acknowledgements=[given]))

    def clear_waiting(self, row: RowKey) -> None:
        """Say that nothing of this instance waits for memory any more."""
        if not self._is_intact() or self._words[self._rows[row.number].base + WAITING]:
            self._change(row, Changes(is_waiting_over=True))

    def free_bytes(self, row: RowKey) -> int:
        """Return what the instance could be promised, its limit aside; negative if it is too late.

        That is what is free, less the promises and static needs of all, its own need aside, and
        less what the others' floors keep. For who wakes, what others have announced that wake later
        is free, unless the lock is held for too long.

        Raises:
            LedgerError: If the instance has left.
        """
        asked = self._ask_device()
        try:
            is_locked = self._enter()
            if not is_locked and not self._is_intact():
                return 0
            base, words, rows = self._base(row), self._words, self._rows
            device_free_bytes = self._still_free_bytes(asked)
            found = free_bytes(words, rows, base, device_free_bytes)
            # What is announced between the two sums would count as free, though others hold it.
            return found + younger_bytes(words, rows, base) if is_locked else found
        finally:
            self._exit()

    def room_bytes(self, row: RowKey) -> int:
        """Return what a request that waits would be promised now, in bytes.

        It takes no lock, and asks the device once a millisecond: an engine may look in each turn of
        its loop.
        """
        device_free_bytes = self._recent_device_free_bytes()
        base = self._look(row)
        if base is None:
            return 0
        return max(room_bytes(self._words, self._rows, base, device_free_bytes, is_waiting=True), 0)

    def _ask_device(self) -> tuple[memoryview, int, int] | None:
        """Return what the device says to be free, and what was allocated before it was asked.

        None where the capacity is all there is to know.
        """
        if self._device_free_bytes is None:
            return None
        words = self._words
        allocated_bytes = words[ALLOCATED] if self._is_intact() else 0
        return words, allocated_bytes, self._device_free_bytes()

    def _still_free_bytes(self, asked: tuple[memoryview, int, int] | None) -> int | None:
        """Return what is left of that by now; nothing counts if the file is another one."""
        if asked is None:
            return None
        words, allocated_bytes, free_bytes = asked
        if words is not self._words:
            return 0
        return int(free_bytes - (words[ALLOCATED] - allocated_bytes))

    def _recent_device_free_bytes(self) -> int | None:
        if self._device_free_bytes is None:
            return None
        now_ns = time.monotonic_ns()
        if now_ns >= self._ask_device_ns:
            self._ask_device_ns = now_ns + _DEVICE_INTERVAL_NS
            self._recent_bytes = self._device_free_bytes()
        return self._recent_bytes
