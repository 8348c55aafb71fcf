"""The host backend with memory that other processes may map: each handle is a file in memory."""

import ctypes
import mmap
import os
from dataclasses import dataclass

from kvcached_core.errors import BackendError
from kvcached_core.memory.vmm.backend import Handle
from kvcached_core.memory.vmm.host import (
    MAP_FAILED,
    MAP_RESERVED,
    PROT_NONE,
    PROT_READ_WRITE,
    HostBackend,
    HostHandle,
    failed,
    libc,
    populate,
)

MAP_FIXED = 0x10  # asm-generic/mman-common.h; Python does not name it


@dataclass(frozen=True, eq=False)
class FileHandle(HostHandle):
    """Memory that is there while it is mapped somewhere, or a descriptor of it is open."""

    fd: int


class SharedHostBackend(HostBackend):
    """Linux memory behind the `SharingBackend` protocol.

    Args:
        granularity_bytes: See `HostBackend`.
    """

    def create(self, num_bytes: int) -> FileHandle:
        """Return a handle of `num_bytes`; Linux provides them when they are mapped."""
        self._check_aligned("create", num_bytes)
        try:
            fd = os.memfd_create("kvcached-weights")
            try:
                os.ftruncate(fd, num_bytes)
            except OSError:
                os.close(fd)
                raise
        except OSError as error:
            raise failed("create", error.errno or 0, num_bytes) from error
        return FileHandle(num_bytes, fd)

    def release(self, handle: Handle) -> None:
        """Give back a handle that is not mapped any more."""
        super().release(handle)
        os.close(_file(handle).fd)

    def export_handle(self, handle: Handle) -> int:
        """Return another descriptor of the file."""
        try:
            return os.dup(_file(handle).fd)
        except OSError as error:
            raise failed("export", error.errno or 0, handle.num_bytes) from error

    def import_handle(self, fd: int, num_bytes: int) -> FileHandle:
        """Return the file of another process."""
        try:
            found_bytes = os.fstat(fd).st_size
            if found_bytes != num_bytes:  # touching what is behind its end would end the process
                raise BackendError("import", f"EINVAL (it has {found_bytes} bytes)", num_bytes)
            return FileHandle(num_bytes, os.dup(fd))
        except OSError as error:
            raise failed("import", error.errno or 0, num_bytes) from error

    def map(self, address: int, handle: Handle) -> None:
        """Put the file under `address`, all of it resident."""
        self._check_aligned("map", address)
        self._mappings.check_map(address, handle)
        size = handle.num_bytes
        _put(address, size, PROT_READ_WRITE, mmap.MAP_SHARED, _file(handle).fd)
        try:
            populate(address, size)
        except BackendError:
            _put(address, size, PROT_NONE, MAP_RESERVED, -1)
            raise
        self._mappings.add(address, handle)

    def unmap(self, address: int, handle: Handle) -> None:
        """Make the addresses inaccessible again; the file stays until the handle is released."""
        self._mappings.check_unmap(address, handle)
        _put(address, handle.num_bytes, PROT_NONE, MAP_RESERVED, -1)
        self._mappings.remove(address, handle)

    def zero(self, address: int, num_bytes: int) -> None:
        """Fill a range with zeros, all of it at once: a file that was mapped before is not."""
        ctypes.memset(address, 0, num_bytes)

    def copy_between(self, address: int, source_address: int, num_bytes: int) -> None:
        """Copy one mapped range to another, all of it at once."""
        self._mappings.check_copy(source_address, num_bytes)
        self.copy_in(address, source_address, num_bytes)


def _put(address: int, num_bytes: int, protection: int, flags: int, fd: int) -> None:
    """Replace what lies under addresses of ours."""
    if libc.mmap(address, num_bytes, protection, flags | MAP_FIXED, fd, 0) == MAP_FAILED:
        raise failed("map", ctypes.get_errno(), num_bytes)


def _file(handle: Handle) -> FileHandle:
    if not isinstance(handle, FileHandle):
        raise BackendError("handle", f"{type(handle).__name__} is not one of this backend", 0)
    return handle
