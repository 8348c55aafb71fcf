"""The host backend: the contract of a GPU's virtual memory, kept with Linux' own.

Reserved addresses are inaccessible (PROT_NONE), so touching a page that is not mapped ends the
process with SIGSEGV, as an illegal access ends it on a GPU. Mapped pages are populated at once, so
resident bytes are real RSS and running out of memory shows while mapping, not later in a kernel.
"""

import ctypes
import errno
import mmap
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvcached_core.errors import BackendError, OutOfMemoryError
from kvcached_core.memory.vmm.backend import Handle, Mappings
from kvcached_core.units import MIB

if TYPE_CHECKING:
    import torch

PROT_NONE = 0
PROT_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
MAP_NORESERVE = 0x4000  # asm-generic/mman.h; Python names it from 3.12 on
MAP_RESERVED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
MADV_DONTNEED = mmap.MADV_DONTNEED
MADV_POPULATE_WRITE = 23  # linux/mman.h, since 5.14; Python does not name it yet
MAP_FAILED = ctypes.c_void_p(-1).value

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long
]  # fmt: skip
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


@dataclass(frozen=True, eq=False)
class HostHandle:
    """A right to `num_bytes` of host memory; Linux provides them when they are mapped."""

    num_bytes: int


class HostFence:
    """A fence on the host: who makes it has done its work before."""

    def wait(self) -> None:
        """Return at once."""

    def join(self, stream: int) -> None:
        """Do nothing: what it is behind is done."""

    def is_done(self) -> bool:
        """Return that it is."""
        return True

    def close(self) -> None:
        """Do nothing: it holds nothing."""


class HostBackend:
    """Linux memory behind the `Backend` protocol.

    Args:
        granularity_bytes: The unit of create and map. The default is NVIDIA's, so that a pool has
            the same pages here as on a GPU.
    """

    def __init__(self, granularity_bytes: int = 2 * MIB) -> None:
        if granularity_bytes <= 0 or granularity_bytes % mmap.PAGESIZE:
            raise BackendError("granularity", "EINVAL", granularity_bytes)
        self.granularity_bytes = granularity_bytes
        self._reservations: dict[int, tuple[int, int]] = {}
        self._mappings = Mappings()

    def reserve(self, num_bytes: int) -> int:
        """Return an aligned address of a new range without memory."""
        self._check_aligned("reserve", num_bytes)
        whole_bytes = num_bytes + self.granularity_bytes
        start = libc.mmap(None, whole_bytes, PROT_NONE, MAP_RESERVED, -1, 0)
        if start == MAP_FAILED:
            raise failed("reserve", ctypes.get_errno(), num_bytes)
        address: int = -(-start // self.granularity_bytes) * self.granularity_bytes
        self._reservations[address] = (start, whole_bytes)
        return address

    def free(self, address: int, num_bytes: int) -> None:
        """Give back a range from `reserve`."""
        self._mappings.check_free(address, num_bytes)
        start, whole_bytes = self._reservations.pop(address)
        _check("free", whole_bytes, libc.munmap(start, whole_bytes))

    def create(self, num_bytes: int) -> HostHandle:
        """Return a handle of `num_bytes`."""
        self._check_aligned("create", num_bytes)
        return HostHandle(num_bytes)

    def release(self, handle: Handle) -> None:
        """Give back a handle that is not mapped any more."""
        self._mappings.check_release(handle)

    def map(self, address: int, handle: Handle) -> None:
        """Make the handle's bytes at `address` readable and writable, all of them resident."""
        self._check_aligned("map", address)
        self._mappings.check_map(address, handle)
        size = handle.num_bytes
        _check("map", size, libc.mprotect(address, size, PROT_READ_WRITE))
        try:
            populate(address, size)
        except BackendError:
            libc.madvise(address, size, MADV_DONTNEED)
            libc.mprotect(address, size, PROT_NONE)
            raise
        self._mappings.add(address, handle)

    def unmap(self, address: int, handle: Handle) -> None:
        """Give the bytes back to Linux and make the addresses inaccessible again."""
        self._mappings.check_unmap(address, handle)
        size = handle.num_bytes
        _check("unmap", size, libc.madvise(address, size, MADV_DONTNEED))
        _check("unmap", size, libc.mprotect(address, size, PROT_NONE))
        self._mappings.remove(address, handle)

    def zero(self, address: int, num_bytes: int) -> None:
        """Do nothing: Linux maps zeros."""

    def join(self, stream: int) -> None:
        """Do nothing: nothing is under way."""

    def synchronize(self) -> None:
        """Do nothing: nothing is under way."""

    def fence(self, stream: int) -> HostFence:  # noqa: ARG002  the host has no streams
        """Return a fence that is behind everything already."""
        return HostFence()

    def copy_in(self, address: int, host_address: int, num_bytes: int) -> None:
        """Copy host bytes to a mapped range, all of it at once."""
        self._mappings.check_copy(address, num_bytes)
        ctypes.memmove(address, host_address, num_bytes)

    def copy_out(self, host_address: int, address: int, num_bytes: int) -> None:
        """Copy a mapped range to host bytes, all of it at once."""
        self._mappings.check_copy(address, num_bytes)
        ctypes.memmove(host_address, address, num_bytes)

    def join_copies(self, stream: int) -> None:
        """Do nothing: nothing is under way."""

    def mark_copies(self) -> HostFence:
        """Return a mark behind copies that are all done."""
        return HostFence()

    def finish_copies(self) -> None:
        """Do nothing: nothing is under way."""

    def register(self, host_address: int, num_bytes: int) -> None:
        """Do nothing: copies on the host are as fast without."""

    def unregister(self, host_address: int) -> None:
        """Do nothing, as `register`."""

    def tensor(self, address: int, num_bytes: int) -> "torch.Tensor":
        """Return an int8 tensor over the range without touching it."""
        import torch  # noqa: PLC0415  the core needs torch nowhere else

        buffer = (ctypes.c_int8 * num_bytes).from_address(address)
        return torch.frombuffer(buffer, dtype=torch.int8)

    def _check_aligned(self, call: str, value: int) -> None:
        if value <= 0 or value % self.granularity_bytes:
            raise BackendError(call, f"EINVAL (not a multiple of {self.granularity_bytes})", value)


def populate(address: int, num_bytes: int) -> None:
    """Have every byte of a mapped range in memory.

    Raises:
        OutOfMemoryError: If there is not enough.
        BackendError: If Linux refuses it for another reason.
    """
    if libc.madvise(address, num_bytes, MADV_POPULATE_WRITE) and ctypes.get_errno() not in (
        errno.EINVAL,  # a kernel before 5.14: pages come with the first touch instead
        0,
    ):
        raise failed("map", ctypes.get_errno(), num_bytes)


def _check(call: str, num_bytes: int, result: int) -> None:
    if result:
        raise failed(call, ctypes.get_errno(), num_bytes)


def failed(call: str, code: int, num_bytes: int) -> BackendError:
    """Return the error of a call that Linux refused with the error number `code`."""
    name = errno.errorcode.get(code, str(code))
    if code in (errno.ENOMEM, errno.EFAULT):
        available = os.sysconf("SC_AVPHYS_PAGES") * mmap.PAGESIZE
        return OutOfMemoryError(call, name, num_bytes, available)
    return BackendError(call, name, num_bytes)
