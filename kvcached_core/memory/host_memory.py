"""How much host memory this process may use: the machine's, or less where a cgroup says so."""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")
# One file of each cgroup holds its limit; version 1 has no word for "no limit", but a huge number.
LIMIT_FILES = {"cgroup": "memory.limit_in_bytes", "cgroup2": "memory.max"}
NO_LIMIT = "max"


@dataclass(frozen=True)
class HostMemory:
    """What this process may use.

    Attributes:
        machine_bytes: The machine's memory.
        usable_bytes: What this process may use of it.
        limited_by: The file of the cgroup that says so; None where the machine is all there is.
    """

    machine_bytes: int
    usable_bytes: int
    limited_by: Path | None = None


def machine_bytes() -> int:
    """Return the machine's memory in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def host_memory(root: Path = ROOT, *, machine: int | None = None) -> HostMemory:
    """Return what this process may use: the least of the machine's memory and its cgroups' limits.

    Every cgroup above this process's own counts as far as it can be seen; in a container that is
    up to the container's own.

    Args:
        root: Where `proc` and what is mounted are found; tests have a tree of their own.
        machine: The machine's memory in bytes; None asks the kernel.
    """
    whole = machine_bytes() if machine is None else machine
    limits = [(whole, None), *_limits(root)]
    usable, file = min(limits, key=lambda limit: limit[0])
    return HostMemory(whole, usable, file)


def _limits(root: Path) -> Iterator[tuple[int, Path]]:
    for kind, folder, top in _own_cgroups(root):
        for level in (folder, *folder.parents):
            file = level / LIMIT_FILES[kind]
            with suppress(OSError, ValueError):  # the topmost cgroup of version 2 has no such file
                text = file.read_text().strip()
                if text != NO_LIMIT:
                    yield int(text), file
            if level == top:
                break


def _own_cgroups(root: Path) -> Iterator[tuple[str, Path, Path]]:
    """Yield the kind, the folder and the topmost folder of each memory cgroup of this process."""
    try:
        paths = dict(_own_paths((root / "proc/self/cgroup").read_text()))
        mounts = list(_mounts((root / "proc/self/mountinfo").read_text()))
    except OSError:
        return
    for kind, mounted_cgroup, mount_point in mounts:
        if kind in paths:
            top = root / mount_point.lstrip("/")
            yield kind, _folder(top, mounted_cgroup, paths[kind]), top


def _own_paths(text: str) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            yield "cgroup2", path
        elif "memory" in controllers.split(","):
            yield "cgroup", path


def _mounts(text: str) -> Iterator[tuple[str, str, str]]:
    """Yield the kind of each mount with a memory controller, what it shows, and where."""
    for line in text.splitlines():
        ours, _, theirs = line.partition(" - ")
        if not theirs:
            continue
        shown, mount_point = (_unescaped(word) for word in ours.split()[3:5])
        kind, *_, options = theirs.split()
        if kind == "cgroup2" or (kind == "cgroup" and "memory" in options.split(",")):
            yield kind, shown, mount_point


def _folder(top: Path, mounted_cgroup: str, own: str) -> Path:
    """Return the folder of the cgroup `own` in a mount at `top` that shows `mounted_cgroup`.

    In a container the mount may show the container's own cgroup alone, or be of another cgroup
    namespace than the path; then what it shows first is the nearest that we know.
    """
    with suppress(ValueError):
        folder = top / Path(own).relative_to(mounted_cgroup)
        if ".." not in folder.parts and folder.is_dir():
            return folder
    return top


def _unescaped(word: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), word)
