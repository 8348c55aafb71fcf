"""What a program holds of a device, as nobody in it tells us: read from outside while it runs."""

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from kvcached_core.config import HOST
from kvcached_core.ledger.file import RowKey
from kvcached_core.ledger.lifetime import own_pid_namespace
from kvcached_core.ledger.nvml import free_memory_reader, process_memory_reader
from kvcached_core.ledger.view import DeviceView
from kvcached_core.memory.devices import Device
from kvcached_core.program.processes import host_bytes

logger = logging.getLogger("kvcached")

# The number that the kernel gives to the first PID namespace, whose ids NVML means.
FIRST_PID_NAMESPACE = 0xEFFFFFFC


class Held(Protocol):
    """Says what the processes of a program hold of a device."""

    def __call__(self, pids: Sequence[int], /) -> int:
        """Return how many bytes the processes hold together."""


def held_reader(
    device: Device, row: RowKey, needed_bytes: int, look: Callable[[], DeviceView]
) -> Held:
    """Return what says how much a program holds of a device.

    On the host that is its processes' memory without files. On a GPU it is what NVML says of them.
    In a container NVML's process ids are not ours, and some drivers do not say a process's size:
    then it is by how much more of the device is in use than engines account for.

    Args:
        device: The device.
        row: The program's row there.
        needed_bytes: What it said to need.
        look: Returns what the device's ledger says.

    Raises:
        BackendError: If NVML does not know the GPU.
    """
    if device.kind == HOST:
        return host_bytes
    free_bytes = free_memory_reader(device.name)
    difference = Difference(row, needed_bytes, lambda: device.total_bytes - free_bytes(), look)
    if own_pid_namespace() != FIRST_PID_NAMESPACE:
        return difference
    return OfProcesses(process_memory_reader(device.name), difference)


class OfProcesses:
    """What a driver says of processes; if it does not say one's size, `otherwise` is asked.

    Args:
        read: Returns the bytes of each process; None where they are not known.
        otherwise: What else says how much the program holds; it began when this did.
    """

    def __init__(self, read: Callable[[], dict[int, int | None]], otherwise: Held) -> None:
        self._read = read
        self._otherwise = otherwise
        self._is_said = True

    def __call__(self, pids: Sequence[int]) -> int:
        """See `Held`."""
        if self._is_said:
            sizes = self._read()
            found = [sizes[pid] for pid in pids if pid in sizes]
            known = [size for size in found if size is not None]
            if len(known) == len(found):
                return sum(known)
            self._is_said = False
            logger.warning(
                "kvcached: the driver does not say what a process holds; it is estimated by what "
                "is in use of the device"
            )
        return self._otherwise(pids)


class Difference:
    """By how much more of a device is in use than before, as far as no engine accounts for it.

    It errs to less: what an engine has announced may be allocated already, so as much of what is
    new counts as that engine's. Then the program's room stays announced for longer.

    Args:
        row: The program's row; what it holds counts in no other's.
        most_bytes: More than this is never said: other programs may be what is new.
        used_bytes: Returns what is in use of the device, by whomever.
        look: Returns what the device's ledger says.
    """

    def __init__(
        self,
        row: RowKey,
        most_bytes: int,
        used_bytes: Callable[[], int],
        look: Callable[[], DeviceView],
    ) -> None:
        self._row = row
        self._most_bytes = most_bytes
        self._used_bytes = used_bytes
        self._look = look
        self._announced: dict[RowKey, int] = {}  # by those that allocate, not those that wait
        self._by_engines = 0
        self._least = self._look_again()[0]

    def __call__(self, _pids: Sequence[int]) -> int:
        """See `Held`."""
        unexplained, announced = self._look_again()
        self._least = min(self._least, unexplained)  # somebody else has freed something
        return min(max(unexplained - self._least - announced, 0), self._most_bytes)

    def _look_again(self) -> tuple[int, int]:
        """Return what is in use and no engine's, and what others have announced."""
        others = [one for one in self._look().instances if one.row != self._row]
        used = self._used_bytes()
        announced = {
            one.row: one.static_bytes for one in others if not (one.is_waking or one.is_program)
        }
        self._by_engines += sum(
            max(before - announced.get(row, 0), 0) for row, before in self._announced.items()
        )
        self._announced = announced
        pages = sum(one.resident_bytes for one in others)
        return used - pages - self._by_engines, sum(one.static_bytes for one in others)
