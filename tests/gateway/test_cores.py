"""How many cores there are, by the mask of this process and by its cgroups' quotas."""

import os
from pathlib import Path

import pytest

from kvcached_gateway.control.cores import usable_cores


def tree(folder: Path, own: str, **quotas: str) -> Path:
    """Write what the kernel says of a process in the cgroup `own`, and each cgroup's quota."""
    (folder / "proc/self").mkdir(parents=True)
    (folder / "proc/self/cgroup").write_text(f"1:memory:/elsewhere\n0::{own}\n")
    for name, text in quotas.items():
        cgroup = folder / "sys/fs/cgroup" / name.replace("_", "/").removeprefix("top").lstrip("/")
        cgroup.mkdir(parents=True, exist_ok=True)
        (cgroup / "cpu.max").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("own", "quotas", "expected"),
    [
        ("/", {}, 64),
        ("/", {"top": "800000 100000"}, 8),
        ("/a/b", {"a_b": "max 100000", "a": "650000 100000"}, 6),
        ("/a/b", {"a_b": "300000 100000", "a": "800000 100000"}, 3),
        ("/a", {"a": "50000 100000"}, 1),
        ("/a", {"a": "broken"}, 64),
        ("/a", {"other": "100000 100000"}, 64),
    ],
)
def test_the_least_quota_above_a_process_counts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    own: str,
    quotas: dict[str, str],
    expected: int,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(64)))
    assert usable_cores(tree(tmp_path, own, **quotas)) == expected


def test_no_more_cores_count_than_the_process_may_run_on(tmp_path: Path) -> None:
    assert usable_cores(tree(tmp_path, "/", top="100000000 100000")) == len(os.sched_getaffinity(0))
    assert usable_cores(tmp_path / "nothing") == len(os.sched_getaffinity(0))
