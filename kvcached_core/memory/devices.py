"""The devices whose memory is shared, by the names that their ledgers have."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvcached_core.config import CUDA, HOST, Config
from kvcached_core.errors import ConfigError, LedgerError
from kvcached_core.ledger.file import NUM_ROWS, RowKey
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.nvml import GPU_PREFIXES, free_memory_reader, near_cpus
from kvcached_core.ledger.opening import doorbell_path, ledger_directory
from kvcached_core.memory.host_memory import host_memory
from kvcached_core.units import format_bytes


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
        """Return what KV caches may hold together, in bytes.

        Raises:
            ConfigError: If the headroom leaves nothing.
        """
        if self.kind == HOST:
            return self.total_bytes
        capacity_bytes = self.total_bytes - config.headroom_bytes(self.total_bytes)
        if capacity_bytes <= 0:
            raise ConfigError(
                f"KVCACHED_HEADROOM={config.headroom!r} is not allowed; {self.name} has "
                f"{format_bytes(self.total_bytes)}, and it must be less"
            )
        return capacity_bytes

    def free_bytes(self, config: Config) -> Callable[[], int] | None:
        """Return a function that says what of the device may be mapped now, or None on the host."""
        return self._free_beside(self.total_bytes - self.capacity_bytes(config))

    def _free_beside(self, headroom_bytes: int) -> Callable[[], int] | None:
        if self.kind == HOST:
            return None
        read = free_memory_reader(self.name)
        return lambda: read() - headroom_bytes

    def join_ledger(self, config: Config) -> Ledger:
        """Open the ledger of the device, with the capacity that those in it agreed on, or make it.

        Raises:
            LedgerError: If it cannot be used.
            BackendError: If the driver says nothing of the device.
        """
        capacity_bytes, path = self.capacity_bytes(config), _ledger_path(self, config)
        try:
            with Ledger(path) as found:
                if found.view().instances:
                    capacity_bytes = found.capacity_bytes
        except LedgerError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
        return Ledger(path, capacity_bytes, self._free_beside(self.total_bytes - capacity_bytes))

    def near_cpus(self) -> frozenset[int]:
        """Return the processors near the device; none where nobody knows, as on the host."""
        return frozenset() if self.kind == HOST else near_cpus(self.name)


def host_device(config: Config) -> Device:
    """Return the host's pool."""
    return Device(HOST, HOST, config.host_pool_bytes(host_memory().usable_bytes))


def cuda_device(uuid: str, total_bytes: int) -> Device:
    """Return the GPU with this UUID, with or without `GPU-` before it."""
    return Device(CUDA, uuid if uuid.startswith(GPU_PREFIXES) else f"GPU-{uuid}", total_bytes)


def open_ledger(device: Device, config: Config) -> Ledger:
    """Open the ledger of a device, or make it.

    Raises:
        LedgerError: If it cannot be used.
    """
    return Ledger(
        _ledger_path(device, config),
        device.capacity_bytes(config),
        device.free_bytes(config),
    )


def _ledger_path(device: Device, config: Config) -> Path:
    path = ledger_directory(config.dir) / f"{device.name}.ledger"
    doorbell_path(path, RowKey(NUM_ROWS - 1, 0))  # its address has to fit
    return path
