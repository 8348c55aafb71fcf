"""The ledger: one small file in shared memory per device that says who may hold how much.

Every process that shares the device maps the file. A change is made under one lock on the open file
description, which the kernel drops when its holder dies. A scheduler *reserves* bytes before it
counts on them; the worker turns the promise into *resident* bytes when it maps them. Rows of dead
owners are reaped: the memory itself went back with their processes.
"""

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from os import SEEK_END, lseek
from pathlib import Path
from time import monotonic_ns
from typing import Self

from kvcached_core import ledger_file as layout
from kvcached_core import sharing
from kvcached_core.errors import LedgerError
from kvcached_core.ledger_file import (
    CHANGES,
    FILE_BYTES,
    FLOOR,
    HEADER_WORDS,
    LIMIT,
    MAGIC,
    NO_LIMIT,
    PROMISED,
    RESIDENT,
    ROW_WORDS,
    STATIC,
    TAKEN,
    WAITING,
    FileLock,
    Header,
    Row,
)
from kvcached_core.ledger_open import open_ledger_file
from kvcached_core.ledger_view import DeviceView, view_of
from kvcached_core.names import check_name
from kvcached_core.processes import is_alive, start_time
from kvcached_core.sharing import NO_POLICY, Policy
from kvcached_core.units import format_bytes

REAP_INTERVAL_NS = 50_000_000


@dataclass(frozen=True)
class Wanted:
    """What others want of an instance, in bytes.

    Attributes:
        asked_bytes: What it shall give back.
        owed_bytes: The part of it for which requests have to stop if nothing else is left.
        num_asked: How often it was asked so far; names the ask that an answer is for.
    """

    asked_bytes: int
    owed_bytes: int
    num_asked: int = 0


class Ledger:
    """An open ledger file.

    Args:
        path: The file; its folder exists (see `ledger_directory`).
        capacity_bytes: What the instances may hold together. The first one to open the file decides
            it; None opens only a file that is there.
        free_bytes: Returns what may be mapped on the device right now, where others than ourselves
            use it too, as on a GPU; None where the capacity is all there is to know.

    Raises:
        LedgerError: If the file is missing, is not ours, or says something else.
    """

    _fd: int
    _header: Header

    def __init__(
        self,
        path: Path,
        capacity_bytes: int | None = None,
        free_bytes: Callable[[], int] | None = None,
    ) -> None:
        self.path = path
        self._device_free_bytes = free_bytes
        self.device = path.stem
        self._own: dict[int, bytes] = {}  # copies of the rows that this process writes
        self._use(*open_ledger_file(path, capacity_bytes))
        self._lock = FileLock(self._fd)
        try:
            if capacity_bytes is not None:
                self._agree_on_capacity(capacity_bytes)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def capacity_bytes(self) -> int:
        """What all instances may hold together, in bytes."""
        return self._header.capacity_bytes

    def register(
        self,
        *,
        name: str,
        engine: str,
        page_bytes: int = 0,
        virtual_bytes: int = 0,
        policy: Policy = NO_POLICY,
        static_bytes: int = 0,
    ) -> int:
        """Take a row for this process and return its number.

        Args:
            name: The instance's name, which no other live instance of the device has.
            engine: The engine and its release.
            page_bytes: Bytes of a page on all of its ranks here, or 0 while it is not known.
            virtual_bytes: Bytes that the engine believes to have, or 0 while it is not known.
            policy: Limit, floor and priority.
            static_bytes: What it is about to allocate beside its KV cache: nobody else is promised
                these bytes while the row lives.

        Raises:
            LedgerError: If the name is taken by a live instance, or all rows are.
            PolicyError: If limit, floor or priority are not allowed.
        """
        check_name(name)
        with self._lock:
            self._check_file()
            self._reap()
            for row in self._live_rows():
                if row.name == name:
                    raise LedgerError(
                        f"an instance named {name!r} (pid {row.holder(0)[0]}) already runs on "
                        f"{self.device}; set KVCACHED_NAME to another name"
                    )
            free = next((row for row in self._rows if not row.is_live), None)
            if free is None:
                raise LedgerError(
                    f"all {layout.NUM_ROWS} rows of {self.path} are taken by live instances"
                )
            free.clear()
            free.name, free.engine = name, engine
            free.limit_bytes = NO_LIMIT
            try:
                self._set_policy(free, policy)
            except BaseException:
                free.clear()
                raise
            free.page_bytes, free.virtual_bytes = page_bytes, virtual_bytes
            free.static_bytes = static_bytes
            free.last_used_ns = time.time_ns()
            free.set_holder(0, os.getpid(), start_time(os.getpid()))
            self._header.num_rows = max(self._header.num_rows, free.index + 1)
            free.is_live = True
            self._keep(free.index, free.base)
            return free.index

    def describe(
        self, index: int, *, page_bytes: int, virtual_bytes: int, least_bytes: int = 0
    ) -> None:
        """Say how large a page, the whole pool and the largest request are, in bytes."""
        with self._lock:
            row = self._row(index)
            row.page_bytes, row.virtual_bytes = page_bytes, virtual_bytes
            row.least_bytes = least_bytes
            self._keep(index, row.base)

    def announce(self, index: int, static_bytes: int) -> list[int]:
        """Say what the process is still about to allocate beside its KV cache, in bytes.

        Returns:
            The rows that wait for memory, if this leaves more than before; ring their bells.
        """
        with self._lock:
            row = self._row(index)
            is_less = static_bytes < row.static_bytes
            row.static_bytes = static_bytes
            self._keep(index, row.base)
            return self._waiting() if is_less else []

    def clear_waiting(self, index: int) -> None:
        """Say that nothing of this instance waits for memory any more."""
        with self._lock:
            row = self._row(index)
            row.waiting_bytes = 0
            self._keep(index, row.base)

    def join(self, index: int) -> None:
        """Count this process among those whose life keeps the row alive: it will hold memory.

        Raises:
            LedgerError: If the row has no place left.
        """
        with self._lock:
            row = self._row(index)
            me = os.getpid(), start_time(os.getpid())
            holders = [row.holder(number) for number in range(layout.NUM_HOLDERS)]
            if me not in holders:
                if (0, 0) not in holders:
                    raise LedgerError(f"instance {row.name!r} has no room for another process")
                row.set_holder(holders.index((0, 0)), *me)
            self._keep(index, row.base)

    def unregister(self, index: int) -> None:
        """Give the row back, and with it everything it held."""
        with self._lock:
            self._row(index).clear()
            self._own.pop(index, None)
            self._unlink_if_unused()

    def set_policy(self, index: int, policy: Policy) -> None:
        """Set what the instance may hold at most, can always get back, and how late it gives.

        Raises:
            PolicyError: If one of them is not allowed; then nothing is changed.
        """
        with self._lock:
            row = self._row(index)
            self._set_policy(row, policy)
            row.num_notices += 1
            row.num_changes += 1

    def reserve(self, index: int, num_bytes: int, unit_bytes: int, *, spare_bytes: int = 0) -> int:
        """Promise up to `num_bytes`, in whole units, and return how many bytes it is.

        A promise never takes the instance over its limit, all instances over the capacity, or
        another one's floor.

        Args:
            index: The instance's row.
            num_bytes: What it needs.
            unit_bytes: What a promise is a multiple of.
            spare_bytes: What it would like on top: granted only of what no other one waits for.
        """
        with self._lock:
            base = self._base(index)
            words = self._words
            if monotonic_ns() - words[layout.LAST_REAP] > REAP_INTERVAL_NS:
                self._reap()
            room = self._room(base)
            granted = num_bytes if room >= num_bytes else max(room // unit_bytes * unit_bytes, 0)
            if spare_bytes:
                left = room - granted - (self._waiting_bytes() - words[base + WAITING])
                granted += min(spare_bytes, max(left // unit_bytes * unit_bytes, 0))
            words[base + PROMISED] += granted
            if granted < num_bytes:
                self._rows[index].num_refused += 1
            elif granted:
                words[base + WAITING] = 0
            self._keep(index, base)
            return granted

    def cancel(self, index: int, num_bytes: int) -> list[int]:
        """Take back `num_bytes` of a promise that were not mapped; return who waits for memory."""
        with self._lock:
            base = self._base(index)
            words = self._words
            words[base + PROMISED] = max(words[base + PROMISED] - num_bytes, 0)
            self._keep(index, base)
            return self._waiting()

    def settle(
        self,
        index: int,
        *,
        mapped_bytes: int = 0,
        unmapped_bytes: int = 0,
        unneeded_bytes: int = 0,
        used_bytes: int,
        cached_bytes: int,
    ) -> list[int]:
        """Record what a worker mapped and unmapped, and what its resident pages are for.

        A promise shrinks by what was mapped and by what turned out not to be needed. Everything
        else that is resident is idle, so resident = used + cached + idle holds at every moment
        anybody can see.

        Returns:
            The rows that wait for memory, if some came free; ring their bells.
        """
        with self._lock:
            base = self._base(index)
            words, row = self._words, self._rows[index]
            freed_bytes = unmapped_bytes + unneeded_bytes
            if mapped_bytes or freed_bytes:
                words[base + PROMISED] = max(
                    words[base + PROMISED] - mapped_bytes - unneeded_bytes, 0
                )
                words[base + RESIDENT] = max(
                    words[base + RESIDENT] + mapped_bytes - unmapped_bytes, 0
                )
                row.coming_bytes = max(row.coming_bytes - freed_bytes, 0)
                row.num_mapped_bytes += mapped_bytes
                row.num_unmapped_bytes += unmapped_bytes
            resident_bytes = words[base + RESIDENT]
            row.used_bytes = used_bytes = min(used_bytes, resident_bytes)
            row.cached_bytes = min(cached_bytes, resident_bytes - used_bytes)
            row.last_used_ns = time.time_ns()
            self._keep(index, base)
            return self._waiting() if freed_bytes else []

    def ask(self, index: int, num_bytes: int) -> int:
        """Ask an instance for up to `num_bytes` of its idle and cached bytes.

        Returns:
            The bytes by which this raised what it is asked for; ring its bell if not 0.
        """
        with self._lock:
            row = self._row(index)
            return self._ask(row, min(num_bytes, row.resident_bytes - row.used_bytes))

    def ask_peers(self, index: int, num_bytes: int, *, is_static: bool = False) -> list[int]:
        """Ask the other instances for `num_bytes` together (see `sharing.shares`), and wait.

        What the own limit would refuse anyway, and what is on its way already, is not asked for.

        Args:
            index: The row in whose name they are asked.
            num_bytes: What it lacks.
            is_static: Whether it is for what was announced. No limit counts that, and nobody's
                requests stop for it.

        Returns:
            The rows that were asked for more than before; ring their bells.
        """
        with self._lock:
            row = self._row(index)
            wanted = num_bytes if is_static else min(num_bytes, self._room_below_limit(row))
            row.waiting_bytes = max(wanted, 0)
            return self._ask_peers(row, wanted, is_static=is_static)

    def ask_for_floor(self, index: int, num_bytes: int) -> list[int]:
        """Ask the other instances for what is missing to a floor; this row does not wait for it.

        Returns:
            The rows that were asked for more than before; ring their bells.
        """
        with self._lock:
            row = self._row(index)
            return self._ask_peers(row, min(num_bytes, self._room_below_limit(row)))

    def num_notices(self, index: int) -> int:
        """Return a number that grows whenever there is something new for the instance.

        It takes no lock: an engine looks between every two steps.
        """
        if lseek(self._fd, 0, SEEK_END) < FILE_BYTES:
            return -1  # cut off; whoever takes the lock next repairs it
        return self._words[HEADER_WORDS + index * ROW_WORDS + layout.NOTICES]

    def wanted(self, index: int) -> Wanted:
        """Return what others, or its limit, want back from this instance."""
        with self._lock:
            row = self._row(index)
            excess = row.excess_bytes
            return Wanted(max(row.asked_bytes, excess), max(row.owed_bytes, excess), row.num_asked)

    def answer(self, index: int, coming_bytes: int = 0, *, num_asked: int | None = None) -> None:
        """Say that this instance gives what it can.

        Args:
            index: Its row.
            coming_bytes: What its workers are about to unmap.
            num_asked: Which ask this answers; of a later one the rest stays. None answers all.
        """
        with self._lock:
            row = self._row(index)
            if num_asked in (None, row.num_asked):
                row.asked_bytes = row.owed_bytes = 0
            else:
                row.asked_bytes = max(row.asked_bytes - coming_bytes, 0)
                row.owed_bytes = min(row.owed_bytes, row.asked_bytes)
            row.coming_bytes += coming_bytes
            row.num_answered += 1
            self._keep(index, row.base)

    def free_bytes(self, index: int) -> int:
        """Return what the instance could be promised, its limit aside; negative if it is too late.

        That is what is free, less the promises and static needs of all, its own need aside, and
        less what the others' floors keep.
        """
        with self._lock:
            return self._free(self._base(index))

    def room_bytes(self, index: int) -> int:
        """Return what the instance would be promised now, in bytes; nothing is promised."""
        with self._lock:
            return max(self._room(self._base(index)), 0)

    def view(self) -> DeviceView:
        """Return a consistent picture of the device, without the dead."""
        with self._lock:
            self._check_file()
            self._reap()
            instances = tuple(view_of(row) for row in self._live_rows())
            free = self._device_free_bytes and self._device_free_bytes()
            return DeviceView(self.device, self._header.capacity_bytes, instances, free)

    def close(self) -> None:
        """Forget the file. Rows of this process stay until they are unregistered or reaped."""
        if self._fd >= 0:
            self._header.release()
            os.close(self._fd)
            self._fd = -1

    def remove_if_unused(self) -> bool:
        """Remove the file if no live instance is in it; return whether it is gone."""
        with self._lock:
            self._check_file()
            self._reap()
            return self._unlink_if_unused()

    def _use(self, fd: int, words: memoryview) -> None:
        self._fd = fd
        self._words = words
        self._header = Header(words)
        self._capacity_bytes = self._header.capacity_bytes
        self._rows = [Row(words, index) for index in range(layout.NUM_ROWS)]

    def _row(self, index: int) -> Row:
        self._base(index)
        return self._rows[index]

    def _base(self, index: int) -> int:
        # Reading behind the end of a file that somebody cut off would end the process.
        if lseek(self._fd, 0, SEEK_END) < FILE_BYTES or self._words[0] != MAGIC:
            self._move_to_new_file()
        base = HEADER_WORDS + index * ROW_WORDS
        if not self._words[base]:
            raise LedgerError(f"row {index} of {self.path} has no instance; it was removed")
        return base

    def _keep(self, index: int, base: int) -> None:
        words = self._words
        words[base + TAKEN] = words[base + RESIDENT] + words[base + PROMISED] + words[base + STATIC]
        words[base + CHANGES] += 1
        self._own[index] = words[base : base + ROW_WORDS].tobytes()

    def _check_file(self) -> None:
        if lseek(self._fd, 0, SEEK_END) < FILE_BYTES or self._words[0] != MAGIC:
            self._move_to_new_file()

    def _move_to_new_file(self) -> None:
        """Leave a file that was damaged, and write the own rows into its successor."""
        self._lock.drop()  # to open it takes the lock
        fd, words = open_ledger_file(self.path, self._capacity_bytes if self._own else None)
        self._lock.take(fd)
        os.close(self._fd)
        self._use(fd, words)
        for index, copy in self._own.items():
            row = self._rows[index]
            mine = Row.of_copy(copy)
            if row.is_live and row.name != mine.name:
                raise LedgerError(
                    f"row {index} of {self.path} was taken by {row.name!r} while the file was "
                    "repaired; restart this engine"
                )
            if not row.is_live or row.num_changes < mine.num_changes:
                row.restore(copy)
            self._header.num_rows = max(self._header.num_rows, index + 1)

    def _live_rows(self) -> list[Row]:
        return [row for row in self._rows[: self._header.num_rows] if row.is_live]

    def _free(self, base: int) -> int:
        words = self._words
        end = HEADER_WORDS + words[layout.NUM_USED_ROWS] * ROW_WORDS
        own_static, own_floor = words[base + STATIC], words[base + FLOOR]
        taken = sum(words[HEADER_WORDS + TAKEN : end : ROW_WORDS]) - own_static
        free = words[layout.CAPACITY] - taken
        if self._device_free_bytes is not None:
            resident = sum(words[HEADER_WORDS + RESIDENT : end : ROW_WORDS])
            free = min(free, self._device_free_bytes() - (taken - resident))
        if sum(words[HEADER_WORDS + FLOOR : end : ROW_WORDS]) > own_floor:
            others = [row for row in self._live_rows() if row.base != base]
            free -= sum(row.unmet_floor_bytes for row in others)
        return free

    def _room(self, base: int) -> int:
        words = self._words
        limit, free = words[base + LIMIT], self._free(base) - words[base + STATIC]
        if limit == NO_LIMIT:
            return free
        return min(free, limit - words[base + RESIDENT] - words[base + PROMISED])

    def _room_below_limit(self, row: Row) -> int:
        limit = row.limit_bytes
        if limit == NO_LIMIT:
            limit = self._header.capacity_bytes
        return limit - row.resident_bytes - row.promised_bytes

    def _ask_peers(self, row: Row, num_bytes: int, *, is_static: bool = False) -> list[int]:
        peers = [other for other in self._live_rows() if other.index != row.index]
        asked = []
        coming_bytes = sum(peer.coming_bytes for peer in peers)
        for share in sharing.shares(row, peers, max(num_bytes - coming_bytes, 0)):
            peer, owed_bytes = share.row, 0 if is_static else share.owed_bytes
            peer.owed_bytes = max(peer.owed_bytes, owed_bytes)
            if self._ask(peer, share.give_bytes + owed_bytes):
                asked.append(peer.index)
        return asked

    def _ask(self, row: Row, num_bytes: int) -> int:
        more = num_bytes - row.asked_bytes
        if more <= 0:
            return 0
        row.asked_bytes += more
        row.num_asked += 1
        row.num_notices += 1
        return more

    def _waiting_bytes(self) -> int:
        words = self._words
        end = HEADER_WORDS + words[layout.NUM_USED_ROWS] * ROW_WORDS
        return sum(words[HEADER_WORDS + WAITING : end : ROW_WORDS])

    def _waiting(self) -> list[int]:
        if not self._waiting_bytes():
            return []
        return [row.index for row in self._live_rows() if row.waiting_bytes]

    def _set_policy(self, row: Row, policy: Policy) -> None:
        peers = [other for other in self._live_rows() if other.index != row.index]
        sharing.check(row, policy, peers, self._header.capacity_bytes)
        row.limit_bytes = NO_LIMIT if policy.limit_bytes is None else policy.limit_bytes
        row.floor_bytes, row.priority = policy.floor_bytes, policy.priority

    def _reap(self) -> None:
        for row in self._live_rows():
            holders = [row.holder(number) for number in range(layout.NUM_HOLDERS)]
            if not any(pid and is_alive(pid, started) for pid, started in holders):
                row.clear()
                doorbell_path(self.path, row.index).unlink(missing_ok=True)
        self._header.last_reap_ns = time.monotonic_ns()

    def _unlink_if_unused(self) -> bool:
        if any(self._live_rows()):
            return False
        self.path.unlink(missing_ok=True)
        return True

    def _agree_on_capacity(self, capacity_bytes: int) -> None:
        with self._lock:
            self._reap()
            rows = self._live_rows()
            if self._header.capacity_bytes != capacity_bytes and rows:
                names = ", ".join(f"{row.name!r} (pid {row.holder(0)[0]})" for row in rows)
                raise LedgerError(
                    f"this engine wants a pool of {format_bytes(capacity_bytes)} on {self.device}, "
                    f"but {self.path} has one of {format_bytes(self._header.capacity_bytes)}, in "
                    f"use by {names}; give every engine the same KVCACHED_HOST_POOL, or set "
                    "KVCACHED_DIR to another folder for a pool of its own"
                )
            self._header.capacity_bytes = self._capacity_bytes = capacity_bytes


def sweep(directory: Path) -> None:
    """Remove the ledgers in `directory` that no live instance uses, and damaged ones."""
    for path in directory.glob("*.ledger"):
        with contextlib.suppress(LedgerError), Ledger(path) as ledger:
            ledger.remove_if_unused()
    for path in directory.glob("*.damaged-*"):
        path.unlink(missing_ok=True)


def doorbell_path(ledger_path: Path, row: int) -> Path:
    """Return the socket on which the instance in `row` is woken."""
    return ledger_path.with_suffix(f".{row}.sock")
