"""A `cuda.bindings.driver` without a GPU: real host addresses, the real driver's rules.

It keeps what was measured on an H200: sizes are multiples of the granularity; a handle is mapped
whole, without an offset; unmap takes whole handles; memory is inaccessible until access is set,
then full of garbage; memory is short at a set capacity; every call needs a context in its thread.
Copies from and to registered host memory are done only when somebody waits for them, in the order
of their stream, and so are those between mapped ranges; others, and those that are in front of
them, at once. Any call can be made to fail.
What is created to be exported is a file in memory: it is there as long as one has it, also another
driver, another process, or a descriptor of it. Its enums and structs are the real module's.
"""

import ctypes
import mmap
import os
import threading
from collections import Counter, deque
from itertools import count
from typing import TYPE_CHECKING, Any

from cuda.bindings import driver as real

from kvcached_core.memory.vmm import dlpack, host
from kvcached_core.units import GIB, MIB

if TYPE_CHECKING:
    from collections.abc import Callable

GARBAGE = 0xA5
CONTEXT = 0xC0DE
UUID = bytes(range(16))
DESCRIPTOR = real.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
MAP_FIXED = 0x10  # asm-generic/mman-common.h; Python does not name it

Result = real.CUresult


class FakeDriver:
    """Stands in for the module; its functions are methods.

    Args:
        capacity_bytes: The device's memory.
        granularity_bytes: The unit of create and map.
    """

    CUresult = real.CUresult
    CUevent_flags = real.CUevent_flags
    CUstream_flags = real.CUstream_flags
    CUmemLocation = real.CUmemLocation
    CUmemLocationType = real.CUmemLocationType
    CUmemAllocationProp = real.CUmemAllocationProp
    CUmemAllocationType = real.CUmemAllocationType
    CUmemAllocationHandleType = real.CUmemAllocationHandleType
    CUmemAccessDesc = real.CUmemAccessDesc
    CUmemAccess_flags = real.CUmemAccess_flags
    CUmemAllocationGranularity_flags = real.CUmemAllocationGranularity_flags

    def __init__(self, capacity_bytes: int = GIB, granularity_bytes: int = 2 * MIB) -> None:
        self.capacity_bytes = capacity_bytes
        self.granularity_bytes = granularity_bytes
        self.calls: Counter[str] = Counter()
        self.threads: dict[str, set[str]] = {}
        self.fails: Callable[[str, int], Any] = lambda _name, _number: None
        self.has_peer_access = True  # to memory that was imported
        self.idle = threading.Event()  # clear it, and the streams stay busy
        self.idle.set()
        self._contexts = threading.local()
        self._ranges: dict[int, tuple[int, int]] = {}
        self._handles: dict[int, int] = {}
        self._mapped: dict[int, int] = {}
        self._files: dict[int, int] = {}  # of handles that can be exported, or were imported
        self._imported: set[int] = set()
        self._events: dict[int, tuple[Any, int] | None] = {}  # a stream, and what it had to do
        self._copies: dict[int, deque[tuple[int, int, int]]] = {}  # to, from and bytes, by stream
        self._num_copied: Counter[int] = Counter()
        self.registered: dict[int, int] = {}
        self._numbers = count(1)  # two threads never have the same one

    @property
    def created_bytes(self) -> int:
        """Bytes of all handles that are not released; those of other devices do not count."""
        handles = list(self._handles.items())  # other threads make and release some meanwhile
        return sum(size for handle, size in handles if handle not in self._imported)

    @property
    def num_imported(self) -> int:
        """Handles that were imported, and not released."""
        return len(self._imported)

    @property
    def mapped_bytes(self) -> int:
        """Bytes of all handles of this device that are mapped."""
        return sum(
            self._handles.get(handle, 0)
            for handle in list(self._mapped.values())
            if handle not in self._imported
        )

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if not name.startswith("cu"):
            return value

        def call(*args: Any) -> tuple[Any, ...]:
            number = self.calls[name]
            self.calls[name] += 1
            self.threads.setdefault(name, set()).add(threading.current_thread().name)
            failure = self.fails(name, number)
            if failure is not None:
                return (failure, None, None)
            needs_context = name not in (
                "cuInit",
                "cuDeviceGet",
                "cuDevicePrimaryCtxRetain",
                "cuCtxSetCurrent",
            )
            if needs_context and not hasattr(self._contexts, "current"):
                return (Result.CUDA_ERROR_INVALID_CONTEXT, None, None)
            result: tuple[Any, ...] = value(*args)
            return result

        return call

    def cuInit(self, _flags: int) -> tuple[Any, ...]:
        return (Result.CUDA_SUCCESS,)

    def cuDeviceGet(self, ordinal: int) -> tuple[Any, ...]:
        if ordinal != 0:
            return (Result.CUDA_ERROR_INVALID_DEVICE, None)
        return (Result.CUDA_SUCCESS, 0)

    def cuDevicePrimaryCtxRetain(self, _device: int) -> tuple[Any, ...]:
        return (Result.CUDA_SUCCESS, CONTEXT)

    def cuCtxSetCurrent(self, context: int) -> tuple[Any, ...]:
        assert context == CONTEXT
        self._contexts.current = context
        return (Result.CUDA_SUCCESS,)

    def cuCtxSynchronize(self) -> tuple[Any, ...]:
        self.idle.wait()
        return (Result.CUDA_SUCCESS,)

    def cuCtxGetStreamPriorityRange(self) -> tuple[Any, ...]:
        return (Result.CUDA_SUCCESS, 0, -5)

    def cuMemGetInfo(self) -> tuple[Any, ...]:
        return (Result.CUDA_SUCCESS, self.capacity_bytes - self.created_bytes, self.capacity_bytes)

    def cuMemGetAllocationGranularity(self, properties: Any, _option: Any) -> tuple[Any, ...]:
        device = real.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        assert properties.location.type == device
        return (Result.CUDA_SUCCESS, self.granularity_bytes)

    def cuMemAddressReserve(
        self, num_bytes: int, alignment: int, address: int, flags: int
    ) -> tuple[Any, ...]:
        if num_bytes <= 0 or num_bytes % self.granularity_bytes or address or flags:
            return (Result.CUDA_ERROR_INVALID_VALUE, None)
        whole_bytes = num_bytes + alignment
        start = host.libc.mmap(None, whole_bytes, host.PROT_NONE, host.MAP_RESERVED, -1, 0)
        if start == host.MAP_FAILED:
            return (Result.CUDA_ERROR_OUT_OF_MEMORY, None)
        aligned = -(-start // alignment) * alignment
        self._ranges[aligned] = (start, whole_bytes)
        return (Result.CUDA_SUCCESS, aligned)

    def cuMemAddressFree(self, address: int, num_bytes: int) -> tuple[Any, ...]:
        if address not in self._ranges or self._mapped_in(address, num_bytes):
            return (Result.CUDA_ERROR_INVALID_VALUE,)
        host.libc.munmap(*self._ranges.pop(address))
        return (Result.CUDA_SUCCESS,)

    def cuMemCreate(self, num_bytes: int, properties: Any, flags: int) -> tuple[Any, ...]:
        if num_bytes <= 0 or num_bytes % self.granularity_bytes or flags:
            return (Result.CUDA_ERROR_INVALID_VALUE, None)
        if self.created_bytes + num_bytes > self.capacity_bytes:
            return (Result.CUDA_ERROR_OUT_OF_MEMORY, None)
        handle = next(self._numbers)
        self._handles[handle] = num_bytes
        if properties.requestedHandleTypes == DESCRIPTOR:
            self._files[handle] = fd = os.memfd_create("fake-device")
            os.write(fd, bytes([GARBAGE]) * num_bytes)
        return (Result.CUDA_SUCCESS, handle)

    def cuMemRelease(self, handle: int) -> tuple[Any, ...]:
        if handle not in self._handles or handle in self._mapped.values():
            return (Result.CUDA_ERROR_INVALID_VALUE,)
        del self._handles[handle]
        self._imported.discard(handle)
        if handle in self._files:
            os.close(self._files.pop(handle))
        return (Result.CUDA_SUCCESS,)

    def cuMemExportToShareableHandle(self, handle: int, kind: Any, flags: int) -> tuple[Any, ...]:
        if handle not in self._files or kind != DESCRIPTOR or flags:
            return (Result.CUDA_ERROR_INVALID_VALUE, None)
        return (Result.CUDA_SUCCESS, os.dup(self._files[handle]))

    def cuMemImportFromShareableHandle(self, fd: int, kind: Any) -> tuple[Any, ...]:
        if kind != DESCRIPTOR:
            return (Result.CUDA_ERROR_INVALID_VALUE, None)
        handle = next(self._numbers)
        self._files[handle] = os.dup(fd)
        self._handles[handle] = os.fstat(fd).st_size
        self._imported.add(handle)
        return (Result.CUDA_SUCCESS, handle)

    def cuMemMap(
        self, address: int, num_bytes: int, offset: int, handle: int, flags: int
    ) -> tuple[Any, ...]:
        whole = num_bytes == self._handles.get(handle)
        if not whole or offset or flags or address % self.granularity_bytes:
            return (Result.CUDA_ERROR_INVALID_VALUE,)
        if not self._is_reserved(address, num_bytes) or self._mapped_in(address, num_bytes):
            return (Result.CUDA_ERROR_INVALID_VALUE,)
        self._mapped[address] = handle
        return (Result.CUDA_SUCCESS,)

    def cuMemSetAccess(
        self, address: int, num_bytes: int, access: list[Any], count: int
    ) -> tuple[Any, ...]:
        assert len(access) == count == 1
        mapped = self._mapped_in(address, num_bytes)
        if sum(self._handles[self._mapped[at]] for at in mapped) != num_bytes:
            return (Result.CUDA_ERROR_INVALID_VALUE,)
        handle = self._mapped[address]
        if handle in self._imported and not self.has_peer_access:
            return (Result.CUDA_ERROR_INVALID_DEVICE,)
        if handle in self._files:
            map_file(address, num_bytes, self._files[handle])
        else:
            host.libc.mprotect(address, num_bytes, host.PROT_READ_WRITE)
            ctypes.memset(address, GARBAGE, num_bytes)
        return (Result.CUDA_SUCCESS,)

    def cuMemUnmap(self, address: int, num_bytes: int) -> tuple[Any, ...]:
        mapped = self._mapped_in(address, num_bytes)
        if sum(self._handles[self._mapped[at]] for at in mapped) != num_bytes:
            return (Result.CUDA_ERROR_INVALID_VALUE,)
        assert not self.is_copied_under_way(address, num_bytes), "unmapped under a copy"
        for at in mapped:
            if self._mapped.pop(at) in self._files:
                reserved = host.MAP_RESERVED | MAP_FIXED
                host.libc.mmap(address, num_bytes, host.PROT_NONE, reserved, -1, 0)
        host.libc.madvise(address, num_bytes, host.MADV_DONTNEED)
        host.libc.mprotect(address, num_bytes, host.PROT_NONE)
        return (Result.CUDA_SUCCESS,)

    def cuMemsetD8Async(
        self, address: int, value: int, num_bytes: int, _stream: Any
    ) -> tuple[Any, ...]:
        ctypes.memset(address, value, num_bytes)
        return (Result.CUDA_SUCCESS,)

    def cuMemcpyHtoDAsync(
        self, address: int, host_address: int, num_bytes: int, stream: int
    ) -> tuple[Any, ...]:
        return self._copy(address, host_address, num_bytes, stream, is_out=False)

    def cuMemcpyDtoHAsync(
        self, host_address: int, address: int, num_bytes: int, stream: int
    ) -> tuple[Any, ...]:
        return self._copy(address, host_address, num_bytes, stream, is_out=True)

    def cuMemcpyAsync(
        self, address: int, source: int, num_bytes: int, stream: int
    ) -> tuple[Any, ...]:
        if not self._is_mapped(address, num_bytes) or not self._is_mapped(source, num_bytes):
            return (Result.CUDA_ERROR_INVALID_VALUE,)
        self._copies.setdefault(stream, deque()).append((address, source, num_bytes))
        return (Result.CUDA_SUCCESS,)

    def cuMemHostRegister(self, host_address: int, num_bytes: int, flags: int) -> tuple[Any, ...]:
        if num_bytes <= 0 or flags:
            return (Result.CUDA_ERROR_INVALID_VALUE,)
        if self._registered_in(host_address, num_bytes):
            return (Result.CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED,)
        self.registered[host_address] = num_bytes
        return (Result.CUDA_SUCCESS,)

    def cuMemHostUnregister(self, host_address: int) -> tuple[Any, ...]:
        if host_address not in self.registered:
            return (Result.CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED,)
        num_bytes = self.registered.pop(host_address)
        assert not self.is_copied_under_way(host_address, num_bytes), "unregistered under a copy"
        return (Result.CUDA_SUCCESS,)

    def cuStreamCreateWithPriority(self, _flags: Any, _priority: int) -> tuple[Any, ...]:
        return (Result.CUDA_SUCCESS, next(self._numbers))

    def cuStreamSynchronize(self, stream: int) -> tuple[Any, ...]:
        self._carry_out(stream)
        return (Result.CUDA_SUCCESS,)

    def cuStreamWaitEvent(self, _stream: Any, event: int, _flags: int) -> tuple[Any, ...]:
        return (self._reach(event),)  # other streams' work is the host's, which has begun

    def cuEventCreate(self, _flags: Any) -> tuple[Any, ...]:
        event = next(self._numbers)
        self._events[event] = None
        return (Result.CUDA_SUCCESS, event)

    def cuEventRecord(self, event: int, stream: int) -> tuple[Any, ...]:
        if event not in self._events:
            return (Result.CUDA_ERROR_INVALID_HANDLE,)
        num_begun = self._num_copied[stream] + len(self._copies.get(stream, ()))
        self._events[event] = (stream, num_begun)
        return (Result.CUDA_SUCCESS,)

    def cuEventSynchronize(self, event: int) -> tuple[Any, ...]:
        self.idle.wait()
        return (self._reach(event),)

    def cuEventQuery(self, event: int) -> tuple[Any, ...]:
        if event not in self._events:
            return (Result.CUDA_ERROR_INVALID_HANDLE,)
        stream, num_copies = self._events[event] or (0, 0)
        is_done = self._num_copied[stream] >= num_copies
        return (Result.CUDA_SUCCESS if is_done else Result.CUDA_ERROR_NOT_READY,)

    def cuEventDestroy(self, event: int) -> tuple[Any, ...]:
        known = event in self._events
        self._events.pop(event, None)
        return (Result.CUDA_SUCCESS if known else Result.CUDA_ERROR_INVALID_HANDLE,)

    def is_copied_under_way(self, address: int, num_bytes: int) -> bool:
        """Return whether a copy that is not done reads or writes in a range."""
        return any(
            _overlap((address, num_bytes), (end, size))
            for copies in list(self._copies.values())
            for to, source, size in list(copies)
            for end in (to, source)
        )

    def _copy(
        self, address: int, host_address: int, num_bytes: int, stream: int, *, is_out: bool
    ) -> tuple[Any, ...]:
        registered = self._registered_in(host_address, num_bytes)
        if not self._is_mapped(address, num_bytes) or not all(
            start <= host_address and host_address + num_bytes <= start + size
            for start, size in registered
        ):
            return (Result.CUDA_ERROR_INVALID_VALUE,)
        to, source = (host_address, address) if is_out else (address, host_address)
        self._copies.setdefault(stream, deque()).append((to, source, num_bytes))
        if not registered:
            self._carry_out(stream)
        return (Result.CUDA_SUCCESS,)

    def _carry_out(self, stream: int, num_copies: int | None = None) -> None:
        """Do a stream's copies, or those up to the `num_copies`-th of all it was given."""
        copies = self._copies.get(stream, deque())
        while copies and (num_copies is None or self._num_copied[stream] < num_copies):
            ctypes.memmove(*copies.popleft())
            self._num_copied[stream] += 1

    def _reach(self, event: int) -> Any:
        if event not in self._events:
            return Result.CUDA_ERROR_INVALID_HANDLE
        recorded = self._events[event]
        if recorded is not None:
            self._carry_out(*recorded)
        return Result.CUDA_SUCCESS

    def _is_reserved(self, address: int, num_bytes: int) -> bool:
        return any(
            aligned <= address and address + num_bytes <= start + whole_bytes
            for aligned, (start, whole_bytes) in list(self._ranges.items())
        )

    def _is_mapped(self, address: int, num_bytes: int) -> bool:
        end = address + num_bytes
        covered = (
            min(at + self._handles.get(handle, 0), end) - max(at, address)
            for at, handle in list(self._mapped.items())
        )
        return sum(size for size in covered if size > 0) == num_bytes

    def _registered_in(self, address: int, num_bytes: int) -> list[tuple[int, int]]:
        found = list(self.registered.items())
        return [each for each in found if _overlap((address, num_bytes), each)]

    def _mapped_in(self, address: int, num_bytes: int) -> list[int]:
        return [at for at in list(self._mapped) if address <= at < address + num_bytes]


def map_file(address: int, num_bytes: int, fd: int) -> None:
    """Put a file in memory under addresses that are reserved."""
    flags = mmap.MAP_SHARED | MAP_FIXED
    mapped = host.libc.mmap(address, num_bytes, host.PROT_READ_WRITE, flags, fd, 0)
    assert mapped == address


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Return whether two ranges, each a start and a length, have a byte in common."""
    return one[0] < other[0] + other[1] and other[0] < one[0] + one[1]


def tensors_on_the_host(monkeypatch: Any) -> None:
    """Let the CUDA backend's tensors be torch CPU tensors: the fake's addresses are the host's."""
    monkeypatch.setattr(dlpack, "CUDA", dlpack.CPU)
