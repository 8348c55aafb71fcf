"""The memory that a process may use: a tree of files as the kernel shows it, and a real cgroup."""

import contextlib
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcached_core.memory.host_memory import HostMemory, host_memory, machine_bytes
from kvcached_core.units import GIB

MACHINE = 24 * GIB
V1_NO_LIMIT = 9223372036854771712
V2_MOUNT = "35 31 0:32 {shown} /sys/fs/cgroup rw,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate"
V1_MOUNT = "35 31 0:32 {shown} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"
OTHER_MOUNTS = (
    "22 1 8:1 / / rw,relatime - ext4 /dev/vda1 rw\n"
    "34 31 0:31 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
)


class Tree:
    """A `/proc` and a `/sys` of our own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "proc/self").mkdir(parents=True)
        (root / "sys/fs/cgroup").mkdir(parents=True)

    def says(self, own: str, mounts: str) -> None:
        (self.root / "proc/self/cgroup").write_text(own)
        (self.root / "proc/self/mountinfo").write_text(OTHER_MOUNTS + mounts + "\n")

    def limit(self, file: str, limit: int | str) -> Path:
        path = self.root / "sys/fs/cgroup" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{limit}\n")
        return path

    def memory(self) -> HostMemory:
        return host_memory(self.root, machine=MACHINE)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_without_cgroups_it_is_the_machines_memory(tree: Tree) -> None:
    assert tree.memory() == HostMemory(MACHINE, MACHINE)
    tree.says("0::/\n", "")
    assert tree.memory() == HostMemory(MACHINE, MACHINE)
    assert host_memory().machine_bytes == machine_bytes()


def test_version_2_says_it_in_memory_max(tree: Tree) -> None:
    tree.says("0::/user.slice/job\n", V2_MOUNT.format(shown="/"))
    file = tree.limit("user.slice/job/memory.max", 3 * GIB)
    tree.limit("user.slice/memory.max", "max")
    assert tree.memory() == HostMemory(MACHINE, 3 * GIB, file)


def test_version_1_says_it_in_limit_in_bytes(tree: Tree) -> None:
    tree.says("9:name=systemd:/x\n4:hugetlb,memory:/job\n0::/\n", V1_MOUNT.format(shown="/"))
    file = tree.limit("memory/job/memory.limit_in_bytes", 3 * GIB)
    tree.limit("memory/memory.limit_in_bytes", V1_NO_LIMIT)
    assert tree.memory() == HostMemory(MACHINE, 3 * GIB, file)


@pytest.mark.parametrize(
    ("own", "mount", "file"),
    [
        ("0::/a/b/c\n", V2_MOUNT, "{}memory.max"),
        ("4:memory:/a/b/c\n", V1_MOUNT, "memory/{}memory.limit_in_bytes"),
    ],
)
@pytest.mark.parametrize("above", ["a/b/c/", "a/b/", "a/"])
def test_the_lowest_limit_of_all_parents_counts(
    tree: Tree, own: str, mount: str, file: str, above: str
) -> None:
    tree.says(own, mount.format(shown="/"))
    for level in ("a/b/c/", "a/b/", "a/"):
        tree.limit(file.format(level), "max" if mount is V2_MOUNT else V1_NO_LIMIT)
    lowest = tree.limit(file.format(above), 2 * GIB)
    tree.limit(file.format("a/other/"), GIB)  # not ours
    assert tree.memory() == HostMemory(MACHINE, 2 * GIB, lowest)


def test_a_limit_above_the_machine_is_none(tree: Tree) -> None:
    tree.says("0::/job\n", V2_MOUNT.format(shown="/"))
    tree.limit("job/memory.max", 2 * MACHINE)
    assert tree.memory() == HostMemory(MACHINE, MACHINE)


@pytest.mark.parametrize(
    ("own", "shown"),
    [
        ("/", "/"),  # a cgroup namespace of its own: the container's cgroup is the root
        ("/kubepods/pod1/box", "/kubepods/pod1/box"),  # none, and the mount shows its own alone
        ("/kubepods/pod1/box", "/"),  # none, and a mount of another namespace
        ("/", "/../../kubepods/pod1/box"),  # the namespace is younger than the mount
        ("/../other", "/"),  # moved out of its namespace
    ],
)
def test_in_a_container_the_mount_is_its_own_cgroup(tree: Tree, own: str, shown: str) -> None:
    tree.says(f"0::{own}\n", V2_MOUNT.format(shown=shown))
    file = tree.limit("memory.max", 4 * GIB)
    assert tree.memory() == HostMemory(MACHINE, 4 * GIB, file)
    tree.says(f"4:memory:{own}\n", V1_MOUNT.format(shown=shown))
    file = tree.limit("memory/memory.limit_in_bytes", 3 * GIB)
    assert tree.memory() == HostMemory(MACHINE, 3 * GIB, file)


def test_a_cgroup_inside_a_container_counts(tree: Tree) -> None:
    tree.says("0::/pod/box/inner\n", V2_MOUNT.format(shown="/pod/box"))
    tree.limit("memory.max", 4 * GIB)
    file = tree.limit("inner/memory.max", 3 * GIB)
    assert tree.memory() == HostMemory(MACHINE, 3 * GIB, file)


def test_both_versions_count_where_both_are_mounted(tree: Tree) -> None:
    tree.says(
        "4:memory:/job\n0::/unit\n",
        V1_MOUNT.format(shown="/") + "\n" + V2_MOUNT.format(shown="/"),
    )
    tree.limit("memory/job/memory.limit_in_bytes", 5 * GIB)
    file = tree.limit("unit/memory.max", 4 * GIB)
    assert tree.memory() == HostMemory(MACHINE, 4 * GIB, file)


def test_a_mount_with_a_space_in_its_name_is_found(tree: Tree) -> None:
    tree.says("0::/job\n", V2_MOUNT.format(shown="/").replace("fs/cgroup", "fs/c\\040group"))
    file = tree.root / "sys/fs/c group/job/memory.max"
    file.parent.mkdir(parents=True)
    file.write_text("max\n")
    assert tree.memory() == HostMemory(MACHINE, MACHINE)
    file.write_text(f"{GIB}\n")
    assert tree.memory() == HostMemory(MACHINE, GIB, file)


@contextlib.contextmanager
def cgroup_of(num_bytes: int) -> Iterator[Path]:
    """Yield a real cgroup with a limit; skip where this user may not make one."""
    version_1 = Path("/sys/fs/cgroup/memory")
    top, name = (
        (version_1, "memory.limit_in_bytes")
        if version_1.is_dir()
        else (Path("/sys/fs/cgroup"), "memory.max")
    )
    folder = top / f"kvcached-test-{secrets.token_hex(4)}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made here: {error}")
    try:
        try:
            (folder / name).write_text(str(num_bytes))
        except OSError as error:
            pytest.skip(f"no memory controller here: {error}")
        yield folder
    finally:
        folder.rmdir()


def test_a_process_in_a_real_cgroup_takes_half_of_its_limit() -> None:
    script = (
        "from kvcached_core.config import read_config\n"
        "from kvcached_core.memory.devices import host_device\n"
        "print(host_device(read_config({})).total_bytes)"
    )
    with cgroup_of(GIB) as folder:
        words = folder / "cgroup.procs", sys.executable, "-c", script
        done = subprocess.run(
            ["sh", "-c", 'echo $$ > "$0"; exec "$@"', *words],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ,
        )
        assert int(done.stdout) == GIB // 2
