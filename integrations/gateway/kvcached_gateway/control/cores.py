"""How many of the machine's cores this process, and so its engines, may use."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

__all__ = ["usable_cores"]

ROOT = Path("/")
CGROUPS = Path("sys/fs/cgroup")
OF_VERSION_2 = "0::"


def usable_cores(root: Path = ROOT) -> int:
    """Return how many cores there are for this process: by its mask, and by its cgroups' quotas.

    Args:
        root: Where `proc` and `sys` are found; tests have a tree of their own.
    """
    return max(min([len(os.sched_getaffinity(0)), *_quotas(root)]), 1)


def _quotas(root: Path) -> Iterator[int]:
    """Yield how many cores each cgroup above this process grants it, as far as they can be seen."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    top = root / CGROUPS
    for line in lines:
        if not line.startswith(OF_VERSION_2):
            continue
        own = top / line.removeprefix(OF_VERSION_2).lstrip("/")
        for folder in (own, *own.parents):
            with suppress(OSError, ValueError):  # "max" is no number, and the topmost has no file
                quota, period = (folder / "cpu.max").read_text().split()
                yield int(quota) // int(period)
            if folder == top:
                break
