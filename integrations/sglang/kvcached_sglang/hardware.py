"""Which device a scheduler's keys and values lie on, and where its pages come from."""

from typing import Any

from kvcached_core.config import CUDA, Config
from kvcached_core.memory.devices import Device, cuda_device, host_device
from kvcached_core.memory.vmm.backend import Backend
from kvcached_core.memory.vmm.host import HostBackend


def find_device(name: Any, config: Config) -> Device:
    """Return the device that SGLang calls `name`; on a GPU, this rank's."""
    if not str(name).startswith(CUDA):
        return host_device(config)
    import torch

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return cuda_device(str(properties.uuid), properties.total_memory)


def make_backend(name: Any) -> Backend:
    """Return what maps pages there."""
    if not str(name).startswith(CUDA):
        return HostBackend()
    import torch

    from kvcached_core.memory.vmm.cuda import CudaBackend

    return CudaBackend(torch.cuda.current_device())


def current_stream() -> int:
    """Return the handle of torch's current CUDA stream."""
    import torch

    return int(torch.cuda.current_stream().cuda_stream)


def reserved_bytes() -> int:
    """Return what torch's allocator has of this process's GPU, in bytes."""
    import torch

    return int(torch.cuda.memory_reserved())
