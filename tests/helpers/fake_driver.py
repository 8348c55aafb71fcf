"""A `cuda.bindings.driver` without a GPU: real host addresses, the real driver's rules.

It keeps what was measured on an H200: sizes are multiples of the granularity; a handle is mapped
whole, without an offset; unmap takes whole handles; memory is inaccessible until access is set,
then full of garbage; memory is short at a set capacity; every call needs a context in its thread.
Any call can be made to fail. Its enums and structs are the real module's.
"""

import ctypes
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any

from cuda.bindings import driver as real

from kvcached_core.memory.vmm import dlpack, host
from kvcached_core.units import GIB, MIB

if TYPE_CHECKING:
    from collections.abc import Callable

GARBAGE = 0xA5
CONTEXT = 0xC0DE
UUID = bytes(range(16))

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
    CUmemAccessDesc = real.CUmemAccessDesc
    CUmemAccess_flags = real.CUmemAccess_flags
    CUmemAllocationGranularity_flags = real.CUmemAllocationGranularity_flags

    def __init__(self, capacity_bytes: int = GIB, granularity_bytes: int = 2 * MIB) -> None:
        self.capacity_bytes = capacity_bytes
        self.granularity_bytes = granularity_bytes
        self.calls: Counter[str] = Counter()
        self.threads: dict[str, set[str]] = {}
        self.fails: Callable[[str, int], Any] = lambda _name, _number: None
        self.idle = threading.Event()  # clear it, and the streams stay busy
        self.idle.set()
        self._contexts = threading.local()
        self._ranges: dict[int, tuple[int, int]] = {}
        self._handles: dict[int, int] = {}
        self._mapped: dict[int, int] = {}
        self._events: set[int] = set()
        self._numbers = 0

    @property
    def created_bytes(self) -> int:
        """Bytes of all handles that are not released."""
        return sum(self._handles.values())

    @property
    def mapped_bytes(self) -> int:
        """Bytes of all handles that are mapped."""
        return sum(self._handles[handle] for handle in self._mapped.values())

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
        start = host._libc.mmap(None, whole_bytes, host.PROT_NONE, host.MAP_RESERVED, -1, 0)
        if start == host.MAP_FAILED:
            return (Result.CUDA_ERROR_OUT_OF_MEMORY, None)
        aligned = -(-start // alignment) * alignment
        self._ranges[aligned] = (start, whole_bytes)
        return (Result.CUDA_SUCCESS, aligned)

    def cuMemAddressFree(self, address: int, num_bytes: int) -> tuple[Any, ...]:
        if address not in self._ranges or self._mapped_in(address, num_bytes):
            return (Result.CUDA_ERROR_INVALID_VALUE,)
        host._libc.munmap(*self._ranges.pop(address))
        return (Result.CUDA_SUCCESS,)

    def cuMemCreate(self, num_bytes: int, _properties: Any, flags: int) -> tuple[Any, ...]:
        if num_bytes <= 0 or num_bytes % self.granularity_bytes or flags:
            return (Result.CUDA_ERROR_INVALID_VALUE, None)
        if self.created_bytes + num_bytes > self.capacity_bytes:
            return (Result.CUDA_ERROR_OUT_OF_MEMORY, None)
        self._numbers += 1
        self._handles[self._numbers] = num_bytes
        return (Result.CUDA_SUCCESS, self._numbers)

    def cuMemRelease(self, handle: int) -> tuple[Any, ...]:
        if handle not in self._handles or handle in self._mapped.values():
            return (Result.CUDA_ERROR_INVALID_VALUE,)
        del self._handles[handle]
        return (Result.CUDA_SUCCESS,)

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
        host._libc.mprotect(address, num_bytes, host.PROT_READ_WRITE)
        ctypes.memset(address, GARBAGE, num_bytes)
        return (Result.CUDA_SUCCESS,)

    def cuMemUnmap(self, address: int, num_bytes: int) -> tuple[Any, ...]:
        mapped = self._mapped_in(address, num_bytes)
        if sum(self._handles[self._mapped[at]] for at in mapped) != num_bytes:
            return (Result.CUDA_ERROR_INVALID_VALUE,)
        for at in mapped:
            del self._mapped[at]
        host._libc.madvise(address, num_bytes, host.MADV_DONTNEED)
        host._libc.mprotect(address, num_bytes, host.PROT_NONE)
        return (Result.CUDA_SUCCESS,)

    def cuMemsetD8Async(
        self, address: int, value: int, num_bytes: int, _stream: Any
    ) -> tuple[Any, ...]:
        ctypes.memset(address, value, num_bytes)
        return (Result.CUDA_SUCCESS,)

    def cuStreamCreateWithPriority(self, _flags: Any, _priority: int) -> tuple[Any, ...]:
        self._numbers += 1
        return (Result.CUDA_SUCCESS, self._numbers)

    def cuStreamSynchronize(self, _stream: Any) -> tuple[Any, ...]:
        return (Result.CUDA_SUCCESS,)

    def cuStreamWaitEvent(self, _stream: Any, event: int, _flags: int) -> tuple[Any, ...]:
        return (self._known(event),)

    def cuEventCreate(self, _flags: Any) -> tuple[Any, ...]:
        self._numbers += 1
        self._events.add(self._numbers)
        return (Result.CUDA_SUCCESS, self._numbers)

    def cuEventRecord(self, event: int, _stream: Any) -> tuple[Any, ...]:
        return (self._known(event),)

    def cuEventSynchronize(self, event: int) -> tuple[Any, ...]:
        self.idle.wait()
        return (self._known(event),)

    def cuEventDestroy(self, event: int) -> tuple[Any, ...]:
        known = self._known(event)
        self._events.discard(event)
        return (known,)

    def _known(self, event: int) -> Any:
        known = event in self._events
        return Result.CUDA_SUCCESS if known else Result.CUDA_ERROR_INVALID_HANDLE

    def _is_reserved(self, address: int, num_bytes: int) -> bool:
        return any(
            aligned <= address and address + num_bytes <= start + whole_bytes
            for aligned, (start, whole_bytes) in self._ranges.items()
        )

    def _mapped_in(self, address: int, num_bytes: int) -> list[int]:
        return [at for at in self._mapped if address <= at < address + num_bytes]


def tensors_on_the_host(monkeypatch: Any) -> None:
    """Let the CUDA backend's tensors be torch CPU tensors: the fake's addresses are the host's."""
    monkeypatch.setattr(dlpack, "CUDA", dlpack.CPU)
