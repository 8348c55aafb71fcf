"""The CUDA backend: the driver's virtual memory, through cuda-python.

All calls run on the device's primary context, the one torch uses, which is made current in every
thread that calls. Steps of the driver that belong together are undone together.
"""

import contextlib
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any

from kvcached_core.errors import BackendError
from kvcached_core.memory.vmm import dlpack
from kvcached_core.memory.vmm.backend import Fence, Handle, Mappings
from kvcached_core.memory.vmm.driver import CudaFence, Driver, StreamFence

if TYPE_CHECKING:
    import torch

# How often a map that the driver answers with NOT_READY is tried again after a drain.
MAX_DRAINS = 3


@dataclass(frozen=True, eq=False)
class CudaHandle:
    """A physical allocation: its size in bytes and the driver's handle."""

    num_bytes: int
    value: Any = field(repr=False)


class CudaBackend:
    """A CUDA device behind the `Backend` protocol.

    Args:
        ordinal: The device's index among those that this process sees: torch's index.
        api: Stands in for `cuda.bindings.driver`; for tests.
        is_sharing: Whether other processes may map what it creates; that cannot be changed later.

    Raises:
        BackendError: If cuda-python, the driver or the device is missing.
    """

    def __init__(
        self, ordinal: int = 0, api: ModuleType | None = None, *, is_sharing: bool = False
    ) -> None:
        self._driver = Driver(ordinal, api)
        self._ordinal = ordinal
        api_types = self._driver.api
        location = api_types.CUmemLocation()
        location.type = api_types.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        location.id = ordinal
        self._properties = api_types.CUmemAllocationProp()
        self._properties.type = api_types.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._properties.location = location
        self._descriptor = (
            api_types.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        )
        if is_sharing:
            self._properties.requestedHandleTypes = self._descriptor
        access = api_types.CUmemAccessDesc()
        access.location = location
        access.flags = api_types.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        self._access = [access]
        minimum = api_types.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        (self.granularity_bytes,) = self._driver.call(
            "cuMemGetAllocationGranularity", self._properties, minimum
        )
        # New memory is zeroed on a stream of its own, ahead of kernels that wait for a free core.
        (lowest, highest) = self._driver.call("cuCtxGetStreamPriorityRange")
        flags = api_types.CUstream_flags.CU_STREAM_NON_BLOCKING
        (self._stream,) = self._driver.call("cuStreamCreateWithPriority", flags, highest)
        # A copy engine does one direction at a time: several streams copy no faster than one.
        (self._copies,) = self._driver.call("cuStreamCreateWithPriority", flags, lowest)
        self._mappings = Mappings()
        self._left: dict[int, CudaHandle] = {}  # by address: there only while undoing a map fails

    @property
    def total_bytes(self) -> int:
        """Bytes of the device."""
        return int(self._driver.call("cuMemGetInfo")[1])

    @property
    def free_bytes(self) -> int:
        """Bytes of the device that nobody has allocated."""
        return int(self._driver.call("cuMemGetInfo")[0])

    def reserve(self, num_bytes: int) -> int:
        """Return the address of a new range without memory."""
        self._check_aligned("reserve", num_bytes)
        (address,) = self._driver.call(
            "cuMemAddressReserve", num_bytes, self.granularity_bytes, 0, 0, num_bytes=num_bytes
        )
        return int(address)

    def free(self, address: int, num_bytes: int) -> None:
        """Give back a range from `reserve`."""
        self._mappings.check_free(address, num_bytes)
        self._clear()
        self._driver.call("cuMemAddressFree", address, num_bytes, num_bytes=num_bytes)

    def create(self, num_bytes: int) -> CudaHandle:
        """Return `num_bytes` of the device's memory."""
        self._check_aligned("create", num_bytes)
        (value,) = self._driver.call(
            "cuMemCreate", num_bytes, self._properties, 0, num_bytes=num_bytes
        )
        return CudaHandle(num_bytes, value)

    def release(self, handle: Handle) -> None:
        """Give back memory from `create`."""
        self._mappings.check_release(handle)
        self._clear()
        self._driver.call("cuMemRelease", _cuda(handle).value, num_bytes=handle.num_bytes)

    def map(self, address: int, handle: Handle) -> None:
        """Map and allow access: both or none.

        Where undoing the first of them fails, too, the next call that needs it tries again.
        """
        self._check_aligned("map", address)
        self._mappings.check_map(address, handle)
        self._clear()
        num_bytes = handle.num_bytes
        self._map_when_ready(address, _cuda(handle))
        try:
            self._driver.call(
                "cuMemSetAccess", address, num_bytes, self._access, 1, num_bytes=num_bytes
            )
        except BackendError:
            self._left[address] = _cuda(handle)
            with contextlib.suppress(BackendError):  # its caller is told of the first failure
                self._clear()
            raise
        self._mappings.add(address, handle)

    def unmap(self, address: int, handle: Handle) -> None:
        """Take the handle away from its addresses."""
        self._mappings.check_unmap(address, handle)
        num_bytes = handle.num_bytes
        self._driver.call("cuMemUnmap", address, num_bytes, num_bytes=num_bytes)
        self._mappings.remove(address, handle)

    def zero(self, address: int, num_bytes: int) -> None:
        """Begin to fill a mapped range with zeros.

        The driver was never seen to hand out anything else (benchmarks/vmm.py), but promises
        nothing, and engines never clear a block: a NaN in it would stay.
        """
        self._driver.call(
            "cuMemsetD8Async", address, 0, num_bytes, self._stream, num_bytes=num_bytes
        )

    def join(self, stream: int) -> None:
        """Let `stream` wait until all that `zero` began is done."""
        self._let_wait(stream, self._stream)

    def synchronize(self) -> None:
        """Return when all that `zero` began is done."""
        self._driver.call("cuStreamSynchronize", self._stream)

    def fence(self, stream: int) -> Fence:
        """Return a fence behind what `stream` has been given so far.

        It cannot fail, because its caller has given up pages already: where the driver refuses an
        event, who waits for the fence waits for the stream, and is told what fails there.
        """
        try:
            return CudaFence(self._driver, stream)
        except BackendError:
            return StreamFence(self._driver, stream)

    def copy_in(self, address: int, host_address: int, num_bytes: int) -> None:
        """Begin to copy host bytes to a mapped range, on the stream of all copies."""
        self._mappings.check_copy(address, num_bytes)
        self._driver.call(
            "cuMemcpyHtoDAsync", address, host_address, num_bytes, self._copies, num_bytes=num_bytes
        )

    def copy_out(self, host_address: int, address: int, num_bytes: int) -> None:
        """Begin to copy a mapped range to host bytes, on the stream of all copies."""
        self._mappings.check_copy(address, num_bytes)
        self._driver.call(
            "cuMemcpyDtoHAsync", host_address, address, num_bytes, self._copies, num_bytes=num_bytes
        )

    def export_handle(self, handle: Handle) -> int:
        """Return a descriptor of memory that was created to be shared."""
        (fd,) = self._driver.call(
            "cuMemExportToShareableHandle",
            _cuda(handle).value,
            self._descriptor,
            0,
            num_bytes=handle.num_bytes,
        )
        return int(fd)

    def import_handle(self, fd: int, num_bytes: int) -> CudaHandle:
        """Return another process' memory, which may be another device's."""
        (value,) = self._driver.call(
            "cuMemImportFromShareableHandle", fd, self._descriptor, num_bytes=num_bytes
        )
        return CudaHandle(num_bytes, value)

    def copy_between(self, address: int, source_address: int, num_bytes: int) -> None:
        """Begin to copy one mapped range to another, on the stream of all copies."""
        self._mappings.check_copy(address, num_bytes)
        self._mappings.check_copy(source_address, num_bytes)
        self._driver.call(
            "cuMemcpyAsync", address, source_address, num_bytes, self._copies, num_bytes=num_bytes
        )

    def join_copies(self, stream: int) -> None:
        """Let `stream` wait until all copies that have begun are done."""
        self._let_wait(stream, self._copies)

    def mark_copies(self) -> CudaFence:
        """Return a point behind all copies that have begun."""
        return CudaFence(self._driver, self._copies)

    def finish_copies(self) -> None:
        """Return when all copies that have begun are done; without the interpreter's lock."""
        self.fence(self._copies).wait()

    def register(self, host_address: int, num_bytes: int) -> None:
        """Page-lock host memory, so that the device reads and writes it by itself."""
        self._driver.call("cuMemHostRegister", host_address, num_bytes, 0, num_bytes=num_bytes)

    def unregister(self, host_address: int) -> None:
        """Let the system move the host memory again."""
        self._driver.call("cuMemHostUnregister", host_address)

    def tensor(self, address: int, num_bytes: int) -> "torch.Tensor":
        """Return an int8 tensor over the range without touching it."""
        return dlpack.int8_tensor(address, num_bytes, (dlpack.CUDA, self._ordinal))

    def _clear(self) -> None:
        """Unmap what could not be unmapped when its access was refused."""
        for address in list(self._left):
            handle = self._left.pop(address, None)
            if handle is None:  # another thread was faster
                continue
            size = handle.num_bytes
            try:
                self._driver.call("cuMemUnmap", address, size, num_bytes=size)
            except BackendError:
                self._left[address] = handle
                raise

    def _let_wait(self, stream: int, other: Any) -> None:
        flags = self._driver.api.CUevent_flags.CU_EVENT_DISABLE_TIMING
        (event,) = self._driver.call("cuEventCreate", flags)
        try:
            self._driver.call("cuEventRecord", event, other)
            self._driver.call("cuStreamWaitEvent", stream, event, 0)
        finally:
            self._driver.call("cuEventDestroy", event)

    def _map_when_ready(self, address: int, handle: CudaHandle) -> None:
        num_bytes = handle.num_bytes
        for num_drains in range(MAX_DRAINS + 1):
            try:
                self._driver.call(
                    "cuMemMap", address, num_bytes, 0, handle.value, 0, num_bytes=num_bytes
                )
            except BackendError as error:
                # The driver may still be busy with what lay at these addresses before.
                if error.code != "CUDA_ERROR_NOT_READY" or num_drains == MAX_DRAINS:
                    raise
                self._driver.call("cuCtxSynchronize")
            else:
                return

    def _check_aligned(self, call: str, value: int) -> None:
        if value <= 0 or value % self.granularity_bytes:
            raise BackendError(call, f"EINVAL (not a multiple of {self.granularity_bytes})", value)


def _cuda(handle: Handle) -> CudaHandle:
    if not isinstance(handle, CudaHandle):
        raise BackendError("handle", f"{type(handle).__name__} is not one of this backend", 0)
    return handle
