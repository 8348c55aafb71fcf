"""What this machine has and who holds how much of it, as values: devices and host memory.

`look` reads files, NVML and /proc: it is for a thread.
"""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from kvcached_core.config import PREFIX
from kvcached_core.errors import BackendError, ConfigError, KVCachedError, LedgerError
from kvcached_core.ledger import nvml
from kvcached_core.ledger.survey import survey
from kvcached_core.ledger.view import DeviceView, InstanceView
from kvcached_core.memory.host_memory import host_memory
from kvcached_core.weights.copies_folder import read_holders
from kvcached_gateway.control.cores import usable_cores
from kvcached_gateway.engines.sessions import Identity, memory_bytes
from kvcached_gateway.settings.config import HOST

__all__ = ["HOST_MEMORY", "DeviceMemory", "Machine", "MachineView"]

# The name of the host's memory among the places that a model takes room in. The device `host` is
# something else: the pool that the KV caches of CPU engines share.
HOST_MEMORY = "host memory"
WEIGHTS_DIR = PREFIX + "WEIGHTS_DIR"
HALF = 2
PROCESS_SECONDS = 2.0


@dataclass(frozen=True)
class DeviceMemory:
    """A device that engines may have; sizes in bytes.

    Attributes:
        id: Its ledger's name: a GPU's UUID, or `host`.
        capacity_bytes: What its instances may hold together; None before its first one told.
        free_bytes: What of that nobody has.
        instances: Who has the rest.
    """

    id: str
    capacity_bytes: int | None
    free_bytes: int
    instances: tuple[InstanceView, ...] = ()

    @property
    def is_known(self) -> bool:
        """Whether anybody has told yet what there is: no driver does of the host's pool."""
        return self.capacity_bytes is not None or self.free_bytes > 0

    @property
    def unnamed_bytes(self) -> int:
        """What is in use and in no engine's count: contexts, graphs, programs."""
        named = sum(view.resident_bytes + view.promised_bytes for view in self.engines)
        return max((self.capacity_bytes or 0) - self.free_bytes - named, 0)

    @property
    def engines(self) -> tuple[InstanceView, ...]:
        """The instances that are no programs."""
        return tuple(view for view in self.instances if not view.is_program)

    @property
    def programs_bytes(self) -> int:
        """What programs have for which `kvcached run` made room, and what they may still take."""
        return sum(view.taken_bytes for view in self.instances if view.is_program)


@dataclass(frozen=True)
class MachineView:
    """The machine at one moment; sizes in bytes.

    Attributes:
        devices: Those that engines may have, by name.
        budget_bytes: What engines' processes and host copies may take of the host's memory.
        engines_bytes: What each model's processes have of their own.
        copies_bytes: What host copies of weights take that an engine uses.
        available_bytes: What the kernel could still give.
        numbers: What a file may call a device beside its name: its number.
        problems: What could not be read, and why.
        num_cores: How many cores engines may use.
        seen_at: When the look at it began, by the loop's clock: what happened later is not in it.
    """

    devices: Mapping[str, DeviceMemory]
    budget_bytes: int
    engines_bytes: Mapping[str, int]
    copies_bytes: int
    available_bytes: int
    numbers: Mapping[str, str] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    num_cores: int = 1
    seen_at: float = math.inf

    @property
    def free_host_bytes(self) -> int:
        """What is left of the budget, and there."""
        left = self.budget_bytes - sum(self.engines_bytes.values()) - self.copies_bytes
        return min(left, self.available_bytes)

    def views(self, instance_name: str, devices: Iterable[str] = ()) -> list[InstanceView]:
        """Return the rows of an instance on the devices named, or on all."""
        names = tuple(devices) or tuple(self.devices)
        return [
            view
            for name in names
            if name in self.devices
            for view in self.devices[name].instances
            if view.name == instance_name
        ]


class Machine:
    """This machine, as far as the file of models lets engines have it.

    Args:
        directory: The folder of the ledgers.
        devices: What the file says: `all`, or UUIDs, numbers and `host`.
        host_memory_bytes: What engines and copies may take; None is half of what is free, or theirs
            already, at the first look.

    Attributes:
        names: The devices, in the ledgers' words.

    Raises:
        ConfigError: If a device is not there.
    """

    def __init__(
        self, directory: Path, devices: str | Sequence[str], host_memory_bytes: int | None
    ) -> None:
        self._directory = directory
        self._numbers = _numbers()
        self.names = _resolve(devices, self._numbers)
        self._budget_bytes = host_memory_bytes
        self._read_of: tuple[tuple[str, Identity], ...] = ()
        self._read_at = 0.0
        self._read: dict[Identity, int] = {}
        self._free = {name: nvml.free_memory_reader(name) for name in self.names if name != HOST}

    def look(
        self, engines: Sequence[tuple[str, Identity]], environs: Iterable[Mapping[str, str]] = ()
    ) -> MachineView:
        """Return what there is now; what processes have is as old as two seconds.

        Args:
            engines: The model of each engine, and its first process.
            environs: Variables that engines may have: they may name a folder of host copies.

        Raises:
            LedgerError: If the folder of the ledgers is gone, or not ours alone.
            BackendError: If the driver says nothing of a device.
        """
        if not self._directory.is_dir():
            raise LedgerError(f"KVCACHED_DIR={str(self._directory)!r} is gone")
        found = survey(self._directory)
        by_name = {view.device: view for view in found.devices}
        devices = {name: self._device(name, by_name.get(name)) for name in self.names}
        engines_bytes = self._engines_bytes(tuple(engines))
        copies_bytes, available_bytes = self._copies_bytes(environs), _available_bytes()
        if self._budget_bytes is None:
            held_bytes = sum(engines_bytes.values()) + copies_bytes
            self._budget_bytes = (available_bytes + held_bytes) // HALF
        return MachineView(
            devices,
            self._budget_bytes,
            engines_bytes,
            copies_bytes,
            available_bytes,
            self._numbers,
            tuple(found.problems),
            usable_cores(),
        )

    def _engines_bytes(self, engines: tuple[tuple[str, Identity], ...]) -> dict[str, int]:
        """Return what each model's processes have; to read it costs more than all else here."""
        now = time.monotonic()
        if engines != self._read_of or now - self._read_at >= PROCESS_SECONDS:
            self._read_of, self._read_at = engines, now
            self._read = memory_bytes(leader for _, leader in engines)
        found: dict[str, int] = {}
        for model_id, leader in engines:
            found[model_id] = found.get(model_id, 0) + self._read.get(leader, 0)
        return found

    def _device(self, name: str, view: DeviceView | None) -> DeviceMemory:
        if view is not None:
            return DeviceMemory(name, view.capacity_bytes, view.free_bytes, view.instances)
        read = self._free.get(name)
        return DeviceMemory(name, None, 0 if read is None else read())

    def _copies_bytes(self, environs: Iterable[Mapping[str, str]]) -> int:
        """Return what host copies take that engines use; others go when there is need."""
        named = {Path(name) for each in environs if (name := each.get(WEIGHTS_DIR))}
        num_bytes = 0
        for folder in {each.resolve() for each in (self._directory / "weights", *named)}:
            with suppress(KVCachedError, OSError):
                held = (holder.num_bytes for holder in read_holders(folder) if holder.is_used)
                num_bytes += sum(held)
        return num_bytes


def _numbers() -> dict[str, str]:
    """Return the number of each GPU by its UUID; nothing where there is no driver."""
    try:
        uuids = nvml.gpu_uuids()
    except BackendError:
        return {}
    return {uuid: str(number) for number, uuid in enumerate(uuids)}


def _resolve(devices: str | Sequence[str], numbers: Mapping[str, str]) -> tuple[str, ...]:
    """Return the devices' names in the ledgers; without a GPU, `all` is the host."""
    if isinstance(devices, str):
        return tuple(numbers) or (HOST,)
    names = {number: uuid for uuid, number in numbers.items()}
    names |= {name: name for name in (*numbers, HOST)}
    unknown = [device for device in devices if device not in names]
    if unknown:
        raise ConfigError(
            f"devices: there is no {', '.join(unknown)}; there are {', '.join(names)}"
        )
    return tuple(dict.fromkeys(names[device] for device in devices))


def _available_bytes() -> int:
    """Return what the kernel, and this process's cgroup, could still give."""
    return min(psutil.virtual_memory().available, host_memory().usable_bytes)
