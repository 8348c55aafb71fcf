"""What host copies find on this machine: room and who holds it, what may be locked, nodes."""

import os
import resource
import shutil
from dataclasses import dataclass
from pathlib import Path

from kvcached_core.config import Config
from kvcached_core.weights.budgets import make_budget
from kvcached_core.weights.copies_folder import Holder, check_folder, read_holders

ROOT = Path("/")
IN_MEMORY = {"tmpfs", "ramfs", "hugetlbfs"}


@dataclass(frozen=True)
class CopiesSurvey:
    """What there is.

    Attributes:
        folder: Of the copies.
        is_there: Whether it has been made.
        room_bytes: What its file system has free.
        file_system: Which kind that is; empty where the kernel does not say.
        budget_bytes: What all copies and claims may be.
        holders: What they are now.
    """

    folder: Path
    is_there: bool
    room_bytes: int
    file_system: str
    budget_bytes: int
    holders: list[Holder]

    @property
    def held_bytes(self) -> int:
        """What all holders have."""
        return sum(holder.num_bytes for holder in self.holders)

    @property
    def missing_bytes(self) -> int:
        """What the folder has not room for of what the budget still allows."""
        return max(self.budget_bytes - self.held_bytes - self.room_bytes, 0)

    @property
    def is_in_memory(self) -> bool:
        """Whether copies in the folder can be pinned, and are read at the speed of memory."""
        return not self.file_system or self.file_system in IN_MEMORY


def survey_copies(config: Config, root: Path = ROOT) -> CopiesSurvey:
    """Return what host copies find; nothing is made or waited for.

    Args:
        config: The settings.
        root: Where `proc` is found; tests have a tree of their own.

    Raises:
        HostCopyError: If the folder cannot be used.
        ConfigError: If the budget is not allowed.
    """
    budget = make_budget(config)
    place = check_folder(budget.folder)
    return CopiesSurvey(
        budget.folder,
        place == budget.folder,
        shutil.disk_usage(place).free,
        _file_system(place, root),
        budget.budget_bytes,
        read_holders(budget.folder),
    )


def pinnable_bytes() -> int | None:
    """Return how much memory a process may lock, or None where it may be all."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def memory_nodes(root: Path = ROOT) -> dict[int, str]:
    """Return the processors of each node of the machine's memory, as the kernel writes them."""
    return {
        int(node.name.removeprefix("node")): (node / "cpulist").read_text().strip()
        for node in sorted((root / "sys/devices/system/node").glob("node[0-9]*"))
    }


def _file_system(place: Path, root: Path) -> str:
    device = place.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = (root / "proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        ours, _, theirs = line.partition(" - ")
        if theirs and ours.split()[2] == number:
            return theirs.split()[0]
    return ""
