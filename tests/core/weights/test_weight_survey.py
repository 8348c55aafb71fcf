"""What host copies find on a machine is read, and nothing is made or changed."""

import os
import resource
from pathlib import Path

import pytest

from kvcached_core.config import Config
from kvcached_core.errors import HostCopyError
from kvcached_core.units import GIB
from kvcached_core.weights.copies_folder import check_folder
from kvcached_core.weights.survey import memory_nodes, pinnable_bytes, survey_copies


def test_a_folder_that_is_not_there_is_looked_at_where_it_would_be(tmp_path: Path) -> None:
    found = survey_copies(Config(weights_dir=tmp_path / "a" / "b", host_budget=GIB))
    assert not found.is_there
    assert found.room_bytes > 0
    assert found.budget_bytes == GIB
    assert (found.held_bytes, found.holders) == (0, [])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_looked_at_as_an_engine_would_find_it(tmp_path: Path) -> None:
    assert check_folder(tmp_path / "a" / "b") == tmp_path
    (tmp_path / "a").mkdir(mode=0o700)
    assert check_folder(tmp_path / "a") == tmp_path / "a"
    (tmp_path / "a").chmod(0o750)
    with pytest.raises(HostCopyError, match="mode 0750"):
        check_folder(tmp_path / "a")
    (tmp_path / "file").touch()
    with pytest.raises(HostCopyError, match="is not a folder of this user"):
        check_folder(tmp_path / "file")
    with pytest.raises(HostCopyError, match="file may not be written to"):
        check_folder(tmp_path / "file" / "a")


def test_a_folder_that_may_not_be_made_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(HostCopyError, match=f"cannot be made: {tmp_path} may not be written to"):
        check_folder(tmp_path / "a")


@pytest.mark.parametrize(
    ("file_system", "is_in_memory"), [("tmpfs", True), ("hugetlbfs", True), ("ext4", False)]
)
def test_the_kind_of_file_system_is_that_of_the_folders_device(
    tmp_path: Path, file_system: str, *, is_in_memory: bool
) -> None:
    device = tmp_path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/mountinfo").write_text(
        "21 1 0:999 / /sys rw shared:1 - sysfs sysfs rw\n"
        "a line of another kernel\n"
        f"22 1 {number} / {tmp_path} rw - {file_system} none rw\n"
    )
    found = survey_copies(Config(weights_dir=tmp_path / "weights"), tmp_path)
    assert found.file_system == file_system
    assert found.is_in_memory == is_in_memory


def test_a_machine_that_does_not_say_is_not_complained_about(tmp_path: Path) -> None:
    found = survey_copies(Config(weights_dir=tmp_path / "weights"), tmp_path)
    assert found.file_system == ""
    assert found.is_in_memory
    assert memory_nodes(tmp_path) == {}


def test_nodes_are_read_with_their_processors(tmp_path: Path) -> None:
    for node, cpus in enumerate(("0-3,8-11", "4-7")):
        folder = tmp_path / f"sys/devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(cpus + "\n")
    assert memory_nodes(tmp_path) == {0: "0-3,8-11", 1: "4-7"}


def test_a_limit_of_locked_memory_is_that_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (123, 456))
    assert pinnable_bytes() == 123
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    assert pinnable_bytes() is None
