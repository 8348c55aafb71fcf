"""What NVML says of the GPUs: it needs no CUDA context, which would cost 300 MiB of the device."""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from kvcached_core.errors import BackendError

logger = logging.getLogger("kvcached")

GPU_PREFIXES = ("GPU-", "MIG-")
_MAX_CPUS, _WORD_BITS = 4096, 64


def free_memory_reader(name: str) -> Callable[[], int]:
    """Return a function that reads how many bytes of a GPU nobody has allocated.

    It never fails: while the GPU does not answer, nothing counts as free, and one warning says so.

    Args:
        name: The GPU's UUID as `nvidia-smi -L` prints it.

    Raises:
        BackendError: If NVML is missing or does not know the GPU.
    """
    nvml = _nvml()
    with _named(f"NVML, device {name}"):
        handle = nvml.nvmlDeviceGetHandleByUUID(name)
        nvml.nvmlDeviceGetMemoryInfo(handle)
    has_failed = False

    def read() -> int:
        nonlocal has_failed
        try:
            free_bytes = int(nvml.nvmlDeviceGetMemoryInfo(handle).free)
        except nvml.NVMLError as error:
            if not has_failed:
                logger.warning(
                    "kvcached: NVML does not say any more what is free on %s (%s); until it does, "
                    "nothing counts as free there",
                    name,
                    error,
                )
            has_failed = True
            return 0
        has_failed = False
        return free_bytes

    return read


def process_memory_reader(name: str) -> Callable[[], dict[int, int | None]]:
    """Return a function that reads how many bytes of a GPU each process has, by its id.

    The ids are those of the first PID namespace: in a container they are other processes'. `None`
    is a size that the driver does not say. While the GPU does not answer, nobody has anything.

    Args:
        name: The GPU's UUID as `nvidia-smi -L` prints it.

    Raises:
        BackendError: If NVML is missing or does not know the GPU.
    """
    nvml = _nvml()
    with _named(f"NVML, device {name}"):
        handle = nvml.nvmlDeviceGetHandleByUUID(name)
    calls = (
        nvml.nvmlDeviceGetComputeRunningProcesses,
        nvml.nvmlDeviceGetGraphicsRunningProcesses,
    )

    def read() -> dict[int, int | None]:
        found: dict[int, int | None] = {}
        for call in calls:
            with suppress(nvml.NVMLError):  # a part of a GPU has no graphics
                found.update({one.pid: one.usedGpuMemory for one in call(handle)})
        return found

    return read


def total_memory(name: str) -> int:
    """Return the memory of a GPU, in bytes.

    Args:
        name: The GPU's UUID as `nvidia-smi -L` prints it.

    Raises:
        BackendError: If NVML is missing or does not know the GPU.
    """
    nvml = _nvml()
    with _named(f"NVML, device {name}"):
        return int(nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByUUID(name)).total)


def near_cpus(name: str) -> frozenset[int]:
    """Return the numbers of the processors near a GPU; none where nobody knows.

    Args:
        name: The GPU's UUID as `nvidia-smi -L` prints it.
    """
    try:
        nvml = _nvml()
        with _named("nvmlDeviceGetCpuAffinity"):
            handle = nvml.nvmlDeviceGetHandleByUUID(name)
            words = nvml.nvmlDeviceGetCpuAffinity(handle, _MAX_CPUS // _WORD_BITS)
    except BackendError:  # a device in a machine of some clouds says nothing of it
        return frozenset()
    return frozenset(
        number * _WORD_BITS + bit
        for number, word in enumerate(words)
        for bit in range(_WORD_BITS)
        if word >> bit & 1
    )


def driver_version() -> str:
    """Return the driver's release.

    Raises:
        BackendError: If NVML is missing, or no driver is there.
    """
    nvml = _nvml()
    with _named("nvmlSystemGetDriverVersion"):
        return str(nvml.nvmlSystemGetDriverVersion())


def gpu_uuids() -> tuple[str, ...]:
    """Return the UUID of every GPU, in NVML's order; `CUDA_VISIBLE_DEVICES` is not asked.

    Raises:
        BackendError: If NVML is missing, or a GPU does not answer.
    """
    nvml = _nvml()
    with _named("nvmlDeviceGetUUID"):
        handles = map(nvml.nvmlDeviceGetHandleByIndex, range(nvml.nvmlDeviceGetCount()))
        return tuple(str(nvml.nvmlDeviceGetUUID(handle)) for handle in handles)


def gpus() -> Iterator[tuple[str, int]]:
    """Yield the name of every GPU and the bytes of it that nobody has allocated.

    Raises:
        BackendError: If NVML is missing, or a GPU does not answer.
    """
    nvml = _nvml()
    with _named("nvmlDeviceGetCount"):
        num_gpus = nvml.nvmlDeviceGetCount()
    for number in range(num_gpus):
        with _named(f"NVML, GPU {number}"):
            handle = nvml.nvmlDeviceGetHandleByIndex(number)
            found = str(nvml.nvmlDeviceGetName(handle)), nvml.nvmlDeviceGetMemoryInfo(handle).free
        yield found[0], int(found[1])


@contextmanager
def _named(call: str) -> Iterator[None]:
    """Turn NVML's errors into ours."""
    try:
        yield
    except _nvml().NVMLError as error:
        raise BackendError(call, str(error), 0) from error


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
