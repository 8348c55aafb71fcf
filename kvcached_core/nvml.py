"""What NVML says of the GPUs: it needs no CUDA context, which would cost 300 MiB of the device."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

from kvcached_core.errors import BackendError

GPU_PREFIXES = ("GPU-", "MIG-")


def free_memory_reader(name: str) -> Callable[[], int]:
    """Return a function that reads how many bytes of a GPU nobody has allocated.

    Args:
        name: The GPU's UUID as `nvidia-smi -L` prints it.

    Raises:
        BackendError: If NVML is missing or does not know the GPU.
    """
    nvml = _nvml()
    try:
        handle = nvml.nvmlDeviceGetHandleByUUID(name)
        nvml.nvmlDeviceGetMemoryInfo(handle)
    except nvml.NVMLError as error:
        raise BackendError(f"NVML, device {name}", str(error), 0) from error
    return lambda: int(nvml.nvmlDeviceGetMemoryInfo(handle).free)


def driver_version() -> str:
    """Return the driver's release.

    Raises:
        BackendError: If NVML is missing, or no driver is there.
    """
    return str(_nvml().nvmlSystemGetDriverVersion())


def gpus() -> Iterator[tuple[str, int]]:
    """Yield the name of every GPU and the bytes of it that nobody has allocated."""
    nvml = _nvml()
    for number in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(number)
        yield str(nvml.nvmlDeviceGetName(handle)), int(nvml.nvmlDeviceGetMemoryInfo(handle).free)


@functools.cache
def _nvml() -> Any:
    try:
        import pynvml  # noqa: PLC0415  a host without a GPU does without it
    except ImportError as error:
        raise BackendError("import pynvml", f"{error}; install nvidia-ml-py", 0) from error
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise BackendError("nvmlInit", str(error), 0) from error
    return pynvml
