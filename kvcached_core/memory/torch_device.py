"""Devices by torch's names: which one it is, what maps memory there, and where its steps run."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvcached_core.config import CUDA, Config
from kvcached_core.memory.devices import Device, cuda_device, host_device
from kvcached_core.memory.rank import RankMemory
from kvcached_core.memory.seats import Placement
from kvcached_core.memory.vmm.backend import Backend, SharingBackend
from kvcached_core.memory.vmm.host import HostBackend
from kvcached_core.memory.vmm.shared_host import SharedHostBackend

if TYPE_CHECKING:
    from kvcached_core.memory.vmm.cuda import CudaBackend


def find_device(device: Any, config: Config) -> Device:
    """Return the device that torch calls `device`; without an index it is the current one."""
    if device.type != CUDA:
        return host_device(config)
    import torch  # noqa: PLC0415  an engine that calls this has it

    properties = torch.cuda.get_device_properties(device)
    return cuda_device(str(properties.uuid), properties.total_memory)


def with_index(device: Any) -> Any:
    """Return a device as its tensors name it: a GPU without an index is the current one."""
    if device.type != CUDA or device.index is not None:
        return device
    import torch  # noqa: PLC0415  as above

    return torch.device(CUDA, torch.cuda.current_device())


def architecture(device: Any) -> str:
    """Return the kind of a device, and of a GPU what its kernels are made for."""
    if device.type != CUDA:
        return str(device.type)
    import torch  # noqa: PLC0415  as above

    major, minor = torch.cuda.get_device_capability(device)
    return f"{device.type} {major}.{minor}"


def make_backend(device: Any) -> Backend:
    """Return what maps pages there; of a GPU it is the same for the whole process."""
    if device.type != CUDA:
        return HostBackend()
    return _gpu_backend(with_index(device).index)


def make_sharing_backend(device: Any) -> SharingBackend:
    """Return what maps pages there that other processes may map, too."""
    if device.type != CUDA:
        return SharedHostBackend()
    return _gpu_backend(with_index(device).index, is_sharing=True)


@functools.cache
def _gpu_backend(index: int, *, is_sharing: bool = False) -> "CudaBackend":
    """Return the one backend of a GPU of its kind: it holds a context and streams."""
    from kvcached_core.memory.vmm.cuda import CudaBackend  # noqa: PLC0415  not on a host without a GPU

    return CudaBackend(index, is_sharing=is_sharing)


def make_memory(placement: Placement, device: Any) -> RankMemory:
    """Return a rank's memory there, whose steps run on torch's current stream.

    Raises:
        KVCachedError: As `RankMemory`.
    """
    backend, stream = make_backend(device), current_stream(device)
    return RankMemory(placement.geometry, placement.num_pages, placement.seat, backend, stream)


def current_stream(device: Any) -> Callable[[], int]:
    """Return a function that says which stream torch launches on there; it is 0 on the host."""
    if device.type != CUDA:
        return lambda: 0
    import torch  # noqa: PLC0415  as above

    return lambda: int(torch.cuda.current_stream(device).cuda_stream)


def release_cached_blocks() -> None:
    """Have torch's allocator give GPUs back what it only keeps for later."""
    import torch  # noqa: PLC0415  as above

    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def reserved_bytes(device: Any) -> Callable[[], int]:
    """Return a function that says what torch's allocator has there for this process, in bytes.

    On the host it is not known, and 0.
    """
    if device.type != CUDA:
        return lambda: 0
    import torch  # noqa: PLC0415  as above

    return lambda: int(torch.cuda.memory_reserved(device))
