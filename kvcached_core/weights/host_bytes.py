"""Host memory at one address, of a file or of this process alone: touched in parallel, then pinned.

A forked child has none of it: its parent's pages would have to be copied for it at once where a
driver has pinned them, and memory that a child keeps is never given back.
"""

import ctypes
import errno
import logging
import mmap
import os
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Protocol, TypeVar
from zlib import crc32

from kvcached_core.errors import BackendError
from kvcached_core.ledger.forks import disown_in_children
from kvcached_core.units import GIB, MIB, format_bytes

MADV_POPULATE_WRITE = 23  # linux/mman.h, since 5.14; Python does not name it yet
MAX_THREADS = 8
MAX_PINNED_BYTES = GIB  # of one registration
# Bytes that are copied at a time: the few that a neighbour's step copies to the same device get in
# between. Smaller ones make a wake longer.
MAX_COPY_BYTES = 16 * MIB

_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
_FAILED = ctypes.c_void_p(-1).value
_libc = ctypes.CDLL(None, use_errno=True)  # unlike the module's, its calls let other threads run
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long
]  # fmt: skip
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

_Result = TypeVar("_Result")

logger = logging.getLogger("kvcached")


class Pinning(Protocol):
    """What a memory backend does to host memory that copies come from and go to."""

    def register(self, host_address: int, num_bytes: int) -> None:
        """Page-lock a range."""

    def unregister(self, host_address: int) -> None:
        """Undo the `register` that began at `host_address`."""


class HostBytes:
    """Readable and writable memory of `num_bytes`, of which nothing is there before `touch`.

    Args:
        num_bytes: Its size.
        unit_bytes: What is touched in one piece, and never lies in two registrations; a multiple of
            the system's page size.
        fd: A file that is at least as long, whose bytes these are; None for private memory.

    Raises:
        OSError: If there are no addresses for it.
    """

    def __init__(self, num_bytes: int, unit_bytes: int, fd: int | None = None) -> None:
        self.num_bytes = num_bytes
        self._unit_bytes = unit_bytes
        self._pinned: list[tuple[Pinning, int]] = []
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS if fd is None else mmap.MAP_SHARED
        address = _libc.mmap(None, num_bytes, _READ_WRITE, flags, -1 if fd is None else fd, 0)
        if address == _FAILED:
            raise _error()
        self.address: int = address
        disown_in_children(self)
        _libc.madvise(address, num_bytes, mmap.MADV_DONTFORK)
        _libc.madvise(address, num_bytes, mmap.MADV_HUGEPAGE)  # where the system has some for us

    def touch(self, stop: threading.Event, cpus: Collection[int] = ()) -> None:
        """Let every byte be there before anybody writes to it; what it holds does not change.

        Takes seconds: call it in a thread of its own. After `stop` is set it returns early.

        Args:
            stop: Set when nobody wants the bytes any more.
            cpus: Where to run: memory is taken near the processor that touches it first.

        Raises:
            OSError: If there is no memory, or no room in the file's system.
        """
        self._in_parallel(lambda offset, num_bytes: self._touch(offset, num_bytes, stop), cpus)

    def checksums(self, stop: threading.Event) -> list[int]:
        """Return a checksum of each unit; takes seconds, and is of no use after `stop` is set."""
        return self._in_parallel(lambda offset, size: self._checksum(offset, size, stop))

    def fill(
        self,
        read: Callable[[int, int, int], object],
        stop: threading.Event,
        cpus: Collection[int] = (),
    ) -> list[int]:
        """Touch each unit, have it read, and return its checksum: several units at a time.

        Args:
            read: Reads so many bytes to an address, from an offset on: address, bytes, offset.
            stop: Set when nobody wants the bytes any more; then what is returned is of no use.
            cpus: See `touch`.

        Raises:
            OSError: If there is no memory, or it cannot be read.
        """

        def one(offset: int, num_bytes: int) -> int:
            self._touch(offset, num_bytes, stop)
            if not stop.is_set():
                read(self.address + offset, num_bytes, offset)
            return self._checksum(offset, num_bytes, stop)

        return self._in_parallel(one, cpus, MAX_THREADS)

    def save(self, write: Callable[[int, int, int], object]) -> None:
        """Have every unit written, several at a time; `write` has the arguments of `read` above.

        Raises:
            OSError: If one cannot be written.
        """
        self._in_parallel(
            lambda offset, size: write(self.address + offset, size, offset), (), MAX_THREADS
        )

    def pin(self, backend: Pinning, stop: threading.Event) -> bool:
        """Let `backend` page-lock all of it; copies from what is not locked are slow, not wrong.

        Takes seconds. Returns whether all of it is locked; if not, one line of the log says why.
        What is locked already stays so.
        """
        units = max(MAX_PINNED_BYTES // self._unit_bytes, 1)
        spans = list(_spans(self.num_bytes, units * self._unit_bytes))
        for offset, num_bytes in spans[len(self._pinned) :]:
            if stop.is_set():
                return False
            try:
                backend.register(self.address + offset, num_bytes)
            except BackendError as error:
                logger.warning(
                    "kvcached: %s of the host copy of weights cannot be page-locked, so they come "
                    "back slower: %s; `ulimit -l` (Docker: --ulimit memlock=-1) may be too low",
                    format_bytes(self.num_bytes - offset),
                    error,
                )
                return False
            self._pinned.append((backend, self.address + offset))
        return True

    def close(self) -> None:
        """Give the addresses back; no copy may be under way. A file keeps its bytes."""
        while self._pinned:
            backend, address = self._pinned.pop()
            with suppress(BackendError):  # the device's context may be gone by now
                backend.unregister(address)
        if self.address:
            _libc.munmap(self.address, self.num_bytes)
            self.address = 0

    def disown(self) -> None:
        """Forget the addresses: a forked child does not have them."""
        self.address = 0
        self._pinned.clear()

    def _checksum(self, offset: int, num_bytes: int, stop: threading.Event) -> int:
        if stop.is_set():
            return 0
        return crc32((ctypes.c_char * num_bytes).from_address(self.address + offset))

    def _in_parallel(
        self,
        work: Callable[[int, int], _Result],
        cpus: Collection[int] = (),
        num_threads: int | None = None,
    ) -> list[_Result]:
        """Return what `work` returns of each unit; a disk needs more threads than processors."""
        usable = os.sched_getaffinity(0)
        near = usable.intersection(cpus) or usable
        with ThreadPoolExecutor(
            num_threads or min(MAX_THREADS, len(near)),
            thread_name_prefix="kvcached-host-copy",
            initializer=os.sched_setaffinity,
            initargs=(0, near),
        ) as threads:
            begun = [
                threads.submit(work, offset, num_bytes)
                for offset, num_bytes in _spans(self.num_bytes, self._unit_bytes)
            ]
            return [done.result() for done in begun]

    def _touch(self, offset: int, num_bytes: int, stop: threading.Event) -> None:
        while not stop.is_set():
            if not _libc.madvise(self.address + offset, num_bytes, MADV_POPULATE_WRITE):
                return
            code = ctypes.get_errno()
            if code == errno.EINVAL:  # a kernel before 5.14: the first use touches instead
                return
            if code == errno.EFAULT:  # instead of the signal that a touch would be answered with
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if code not in (errno.EINTR, errno.EAGAIN):
                raise _error()


def touched(
    num_bytes: int, page_bytes: int, stop: threading.Event, cpus: Collection[int] = ()
) -> HostBytes:
    """Return private memory of which every byte is there; the arguments are those of `HostBytes`.

    Raises:
        OSError: If there is not so much.
    """
    taken = HostBytes(num_bytes, page_bytes)
    try:
        taken.touch(stop, cpus)
    except BaseException:
        taken.close()
        raise
    return taken


def _spans(num_bytes: int, step_bytes: int) -> Iterator[tuple[int, int]]:
    for offset in range(0, num_bytes, step_bytes):
        yield offset, min(step_bytes, num_bytes - offset)


def _error() -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code))
