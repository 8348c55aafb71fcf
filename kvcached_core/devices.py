"""The devices whose memory is shared, by the names that their ledgers have."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvcached_core.config import CUDA, HOST, Config
from kvcached_core.errors import BackendError
from kvcached_core.ledger import Ledger
from kvcached_core.ledger_open import ledger_directory


@dataclass(frozen=True)
class Device:
    """One device that engines share.

    Attributes:
        kind: `host` or `cuda`.
        name: The name of its ledger: `host`, or the GPU's UUID as `nvidia-smi -L` prints it.
        total_bytes: Its memory in bytes; on the host, the pool.
    """

    kind: str
    name: str
    total_bytes: int

    def capacity_bytes(self, config: Config) -> int:
        """Return what KV caches may hold together, in bytes."""
        if self.kind == HOST:
            return self.total_bytes
        return self.total_bytes - config.headroom_bytes(self.total_bytes)

    def free_bytes(self, config: Config) -> Callable[[], int] | None:
        """Return a function that says what of the device may be mapped now, or None on the host.

        It asks NVML, which needs no CUDA context: one costs 300 MiB of the device.
        """
        if self.kind == HOST:
            return None
        headroom_bytes = config.headroom_bytes(self.total_bytes)
        read = free_memory_reader(self.name)
        return lambda: read() - headroom_bytes


def host_device(config: Config) -> Device:
    """Return the host's pool."""
    return Device(HOST, HOST, config.host_pool)


def cuda_device(uuid: str, total_bytes: int) -> Device:
    """Return the GPU with this UUID, with or without `GPU-` before it."""
    return Device(CUDA, uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}", total_bytes)


def open_ledger(device: Device, config: Config) -> Ledger:
    """Open the ledger of a device, or make it.

    Raises:
        LedgerError: If it cannot be used.
    """
    return Ledger(
        ledger_directory(config.dir) / f"{device.name}.ledger",
        device.capacity_bytes(config),
        device.free_bytes(config),
    )


def free_memory_reader(name: str) -> Callable[[], int]:
    """Return a function that reads how many bytes of a GPU nobody has allocated.

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
