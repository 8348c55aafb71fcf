"""The ledger: one small file in shared memory per device that says who may hold how much.

Every process that shares the device maps the file. A change is made under one lock on the open file
description, which the kernel drops when its holder dies. A scheduler *reserves* bytes before it
counts on them; the worker turns the promise into *resident* bytes when it maps them. Rows of dead
owners are reaped: the memory itself went back with their processes.
"""

import contextlib
import mmap
import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from kvcached_core import ledger_file as layout
from kvcached_core.errors import LedgerError
from kvcached_core.ledger_file import FileLock, Header, Row
from kvcached_core.processes import is_alive, start_time
from kvcached_core.units import format_bytes

REAP_INTERVAL_SECONDS = 0.05
NO_LIMIT = -1


@dataclass(frozen=True)
class InstanceView:
    """What the ledger knows of one instance at one moment; sizes in bytes."""

    row: int
    name: str
    engine: str
    pid: int
    limit_bytes: int | None
    floor_bytes: int
    priority: int
    page_bytes: int
    virtual_bytes: int
    resident_bytes: int
    used_bytes: int
    cached_bytes: int
    idle_bytes: int
    promised_bytes: int
    asked_bytes: int
    coming_bytes: int
    last_used_seconds: float


@dataclass(frozen=True)
class DeviceView:
    """One device and its instances at one moment."""

    device: str
    capacity_bytes: int
    instances: tuple[InstanceView, ...]

    @property
    def free_bytes(self) -> int:
        """Bytes that are neither resident nor promised."""
        taken = sum(view.resident_bytes + view.promised_bytes for view in self.instances)
        return self.capacity_bytes - taken


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

    def __init__(
        self,
        path: Path,
        capacity_bytes: int | None = None,
        free_bytes: Callable[[], int] | None = None,
    ) -> None:
        self.path = path
        self._free_bytes = free_bytes
        self.device = path.stem
        self._fd, self._words = _open(path, capacity_bytes)
        self._lock = FileLock(self._fd)
        self._header = Header(self._words)
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
        limit_bytes: int | None = None,
        static_bytes: int = 0,
    ) -> int:
        """Take a row for this process and return its number.

        Args:
            name: The instance's name, which no other live instance of the device has.
            engine: The engine and its release.
            page_bytes: Bytes of a page, or 0 while it is not known.
            virtual_bytes: Bytes that the engine believes to have, or 0 while it is not known.
            limit_bytes: What the instance may hold at most.
            static_bytes: What it is about to allocate beside its KV cache: nobody else is promised
                these bytes while the row lives.

        Raises:
            LedgerError: If the name is taken by a live instance, or all rows are.
        """
        with self._lock:
            self._reap()
            rows = [Row(self._words, index) for index in range(layout.NUM_ROWS)]
            for row in rows[: self._header.num_rows]:
                if row.is_live and row.name == name:
                    raise LedgerError(
                        f"an instance named {name!r} (pid {row.holder(0)[0]}) already runs on "
                        f"{self.device}; set KVCACHED_NAME to another name"
                    )
            free = next((row for row in rows if not row.is_live), None)
            if free is None:
                raise LedgerError(
                    f"all {layout.NUM_ROWS} rows of {self.path} are taken by live instances"
                )
            free.clear()
            free.name, free.engine = name, engine
            free.page_bytes, free.virtual_bytes = page_bytes, virtual_bytes
            free.limit_bytes = NO_LIMIT if limit_bytes is None else limit_bytes
            free.static_bytes = static_bytes
            free.last_used_ns = time.time_ns()
            free.set_holder(0, os.getpid(), start_time(os.getpid()))
            self._header.num_rows = max(self._header.num_rows, free.index + 1)
            free.is_live = True
            return free.index

    def describe(self, index: int, *, page_bytes: int, virtual_bytes: int) -> None:
        """Say how large a page and the whole pool of the instance are, in bytes."""
        with self._lock:
            row = self._row(index)
            row.page_bytes, row.virtual_bytes = page_bytes, virtual_bytes

    def announce(self, index: int, static_bytes: int) -> None:
        """Say what the process is still about to allocate beside its KV cache, in bytes."""
        with self._lock:
            self._row(index).static_bytes = static_bytes

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

    def unregister(self, index: int) -> None:
        """Give the row back, and with it everything it held."""
        with self._lock:
            self._row(index).is_live = False
            self._unlink_if_unused()

    def reserve(self, index: int, num_bytes: int, unit_bytes: int) -> int:
        """Promise up to `num_bytes`, in whole units, and return how many bytes it is.

        A promise never takes the instance over its limit, nor all instances over the capacity.
        """
        with self._lock:
            row = self._row(index)
            if time.monotonic_ns() - self._header.last_reap_ns > REAP_INTERVAL_SECONDS * 1e9:
                self._reap()
            room = self._room(row)
            granted = max(min(num_bytes, room // unit_bytes * unit_bytes), 0)
            row.promised_bytes += granted
            if granted < num_bytes:
                row.num_refused += 1
            return granted

    def cancel(self, index: int, num_bytes: int) -> None:
        """Take back `num_bytes` of a promise that were not mapped."""
        with self._lock:
            row = self._row(index)
            row.promised_bytes = max(row.promised_bytes - num_bytes, 0)

    def settle(
        self,
        index: int,
        *,
        mapped_bytes: int = 0,
        unmapped_bytes: int = 0,
        unneeded_bytes: int = 0,
        used_bytes: int,
        cached_bytes: int,
    ) -> None:
        """Record what a worker mapped and unmapped, and what its resident pages are for.

        A promise shrinks by what was mapped and by what turned out not to be needed.

        Everything else that is resident is idle, so resident = used + cached + idle holds at every
        moment anybody can see.
        """
        with self._lock:
            row = self._row(index)
            row.promised_bytes = max(row.promised_bytes - mapped_bytes - unneeded_bytes, 0)
            row.coming_bytes = max(row.coming_bytes - unmapped_bytes - unneeded_bytes, 0)
            row.resident_bytes += mapped_bytes - unmapped_bytes
            row.used_bytes = min(used_bytes, row.resident_bytes)
            row.cached_bytes = min(cached_bytes, row.resident_bytes - row.used_bytes)
            row.num_mapped_bytes += mapped_bytes
            row.num_unmapped_bytes += unmapped_bytes
            row.last_used_ns = time.time_ns()

    def ask(self, index: int, num_bytes: int) -> int:
        """Ask an instance for up to `num_bytes` of its idle and cached bytes.

        Returns:
            The bytes by which this raised what it is asked for; ring its bell if not 0.
        """
        with self._lock:
            return self._ask(self._row(index), num_bytes)

    def ask_peers(self, index: int, num_bytes: int) -> list[int]:
        """Ask the other instances for `num_bytes` together: who has been unused longest first.

        What the own limit would refuse anyway is not asked for.

        Returns:
            The rows that were asked for more than before; ring their bells.
        """
        asked = []
        with self._lock:
            num_bytes = min(num_bytes, self._room_below_limit(self._row(index)))
            peers = [row for row in self._live_rows() if row.index != index]
            for row in sorted(peers, key=lambda row: (row.priority, row.last_used_ns)):
                if num_bytes <= 0:
                    break
                give = min(num_bytes, row.resident_bytes - row.used_bytes)
                if self._ask(row, give):
                    asked.append(row.index)
                num_bytes -= give
        return asked

    def asked_bytes(self, index: int) -> int:
        """Return the bytes that others want back from this instance."""
        return Row(self._words, index).asked_bytes

    def answer(self, index: int, coming_bytes: int = 0) -> None:
        """Say that this instance gives what it can.

        Args:
            index: Its row.
            coming_bytes: What its workers are about to unmap.
        """
        with self._lock:
            row = self._row(index)
            row.asked_bytes = 0
            row.coming_bytes += coming_bytes

    def view(self) -> DeviceView:
        """Return a consistent picture of the device, without the dead."""
        with self._lock:
            self._reap()
            instances = tuple(_view(row) for row in self._live_rows())
            return DeviceView(self.device, self._header.capacity_bytes, instances)

    def close(self) -> None:
        """Forget the file. Rows of this process stay until they are unregistered or reaped."""
        if self._fd >= 0:
            self._header.release()
            self._words.release()
            os.close(self._fd)
            self._fd = -1

    def remove_if_unused(self) -> bool:
        """Remove the file if no live instance is in it; return whether it is gone."""
        with self._lock:
            self._reap()
            return self._unlink_if_unused()

    def _unlink_if_unused(self) -> bool:
        if any(self._live_rows()):
            return False
        self.path.unlink(missing_ok=True)
        return True

    def _live_rows(self) -> list[Row]:
        rows = (Row(self._words, index) for index in range(self._header.num_rows))
        return [row for row in rows if row.is_live]

    def _row(self, index: int) -> Row:
        row = Row(self._words, index)
        if not row.is_live:
            raise LedgerError(f"row {index} of {self.path} has no instance; it was removed")
        return row

    def free_bytes(self, index: int) -> int:
        """Return what the instance could be promised, its limit aside; negative if it is too late.

        That is what is free, less the promises and static needs of all, its own need aside.
        """
        with self._lock:
            return self._free(self._row(index))

    def _room(self, row: Row) -> int:
        return min(self._free(row), self._room_below_limit(row))

    def _free(self, row: Row) -> int:
        rows = self._live_rows()
        promised = sum(other.promised_bytes + other.static_bytes for other in rows)
        unmapped = self._header.capacity_bytes - sum(other.resident_bytes for other in rows)
        if self._free_bytes is not None:
            unmapped = min(unmapped, self._free_bytes())
        return unmapped - promised + row.static_bytes

    def _room_below_limit(self, row: Row) -> int:
        limit = self._header.capacity_bytes if row.limit_bytes == NO_LIMIT else row.limit_bytes
        return limit - row.resident_bytes - row.promised_bytes

    def _ask(self, row: Row, num_bytes: int) -> int:
        more = min(num_bytes, row.resident_bytes - row.used_bytes) - row.asked_bytes
        if more <= 0:
            return 0
        row.asked_bytes += more
        return more

    def _reap(self) -> None:
        for row in self._live_rows():
            holders = [row.holder(number) for number in range(layout.NUM_HOLDERS)]
            if not any(pid and is_alive(pid, started) for pid, started in holders):
                row.is_live = False
                doorbell_path(self.path, row.index).unlink(missing_ok=True)
        self._header.last_reap_ns = time.monotonic_ns()

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
            self._header.capacity_bytes = capacity_bytes


def ledger_directory(directory: Path) -> Path:
    """Make the folder of the ledgers, for this user alone, and return it.

    Raises:
        LedgerError: If it cannot be made, is not ours, or others may look into it.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.lstat()
    except OSError as error:
        raise LedgerError(
            f"KVCACHED_DIR={str(directory)!r} cannot be made: {error.strerror}; "
            "name a folder that this user may write"
        ) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise LedgerError(f"KVCACHED_DIR={str(directory)!r} is not a folder of this user")
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise LedgerError(
            f"KVCACHED_DIR={str(directory)!r} is open to other users (mode "
            f"{stat.S_IMODE(found.st_mode):04o}); allowed is 0700"
        )
    return directory


def sweep(directory: Path) -> None:
    """Remove the ledgers in `directory` that no live instance uses."""
    for path in directory.glob("*.ledger"):
        with contextlib.suppress(LedgerError), Ledger(path) as ledger:
            ledger.remove_if_unused()


def doorbell_path(ledger_path: Path, row: int) -> Path:
    """Return the socket on which the instance in `row` is woken."""
    return ledger_path.with_suffix(f".{row}.sock")


def _open(path: Path, capacity_bytes: int | None) -> tuple[int, memoryview]:
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    if capacity_bytes is not None:
        flags |= os.O_CREAT
    while True:
        try:
            fd = os.open(path, flags, 0o600)
        except OSError as error:
            raise LedgerError(f"the ledger {path} cannot be opened: {error.strerror}") from error
        try:
            with FileLock(fd):
                if _is_current(fd, path):
                    return fd, _map(fd, path, capacity_bytes)
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # its last user removed it meanwhile: open the new one


def _is_current(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.lstat())
    except FileNotFoundError:
        return False


def _map(fd: int, path: Path, capacity_bytes: int | None) -> memoryview:
    found = os.fstat(fd)
    if found.st_uid != os.geteuid() or not stat.S_ISREG(found.st_mode):
        raise LedgerError(f"the ledger {path} is not a file of this user")
    is_new = found.st_size == 0 and capacity_bytes is not None
    if is_new:
        os.ftruncate(fd, layout.FILE_BYTES)
    elif found.st_size != layout.FILE_BYTES:
        raise LedgerError(
            f"the ledger {path} has {found.st_size} bytes, expected are {layout.FILE_BYTES}: it is "
            "damaged or of another version; stop its engines and remove it"
        )
    words = memoryview(mmap.mmap(fd, layout.FILE_BYTES)).cast("q")
    header = Header(words)
    if is_new:
        header.initialise(capacity_bytes or 0)
    elif header.magic != layout.MAGIC or header.version != layout.VERSION:
        found_version = header.version if header.magic == layout.MAGIC else "unknown"
        header.release()
        words.release()
        raise LedgerError(
            f"the ledger {path} is of version {found_version}, this kvcached writes version "
            f"{layout.VERSION}; run one version on a device, or remove the file when no engine "
            "uses it"
        )
    return words


def _view(row: Row) -> InstanceView:
    resident, used, cached = row.resident_bytes, row.used_bytes, row.cached_bytes
    return InstanceView(
        row=row.index,
        name=row.name,
        engine=row.engine,
        pid=row.holder(0)[0],
        limit_bytes=None if row.limit_bytes == NO_LIMIT else row.limit_bytes,
        floor_bytes=row.floor_bytes,
        priority=row.priority,
        page_bytes=row.page_bytes,
        virtual_bytes=row.virtual_bytes,
        resident_bytes=resident,
        used_bytes=used,
        cached_bytes=cached,
        idle_bytes=resident - used - cached,
        promised_bytes=row.promised_bytes,
        asked_bytes=row.asked_bytes,
        coming_bytes=row.coming_bytes,
        last_used_seconds=row.last_used_ns / 1e9,
    )
