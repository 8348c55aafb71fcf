"""`kvcached doctor` says of a folder what an engine that starts would find."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType

import pytest
from helpers.commands import KVCACHED

from kvcached_core.cli import doctor
from kvcached_core.cli.doctor import Finding, examine
from kvcached_core.config import Config
from kvcached_core.ledger import file as ledger_file
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.opening import ledger_directory
from kvcached_core.memory.host_memory import HostMemory
from kvcached_core.units import GIB, MIB
from kvcached_core.weights import survey
from kvcached_core.weights.host_budget import HostBudget


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(ledger_directory(tmp_path / "kv") / "host.ledger", GIB) as opened:
        opened.register(name="llama", engine="vllm 0.32.0")
        yield opened


@pytest.fixture(autouse=True)
def adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let none look at its engine's files, which takes a second; a command's process does."""
    monkeypatch.setattr(doctor, "entry_points", lambda **_: [])


def found(directory: Path) -> dict[str, Finding]:
    return {finding.what: finding for finding in examine(directory)}


def problem(directory: Path) -> str:
    folder = found(directory)["folder"]
    assert not folder.is_good
    return folder.text


def test_the_command_names_every_problem_and_fails_for_it(ledger: Ledger) -> None:
    folder = ledger.path.parent
    command = [KVCACHED, "doctor", "--dir", folder]
    good = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "ok    host.ledger: 1 GiB shared by llama" in good.stdout
    (folder / "cut.ledger").write_bytes(b"nonsense")
    bad = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    assert bad.returncode == 1
    rows = {row["what"]: row for row in json.loads(bad.stdout)}
    assert not rows["cut.ledger"]["is_good"]
    assert "damaged" in rows["cut.ledger"]["text"]
    assert rows["host.ledger"]["is_good"]


def test_a_folder_in_which_engines_start_is_good_and_left_as_it_was(ledger: Ledger) -> None:
    folder = ledger.path.parent
    before, view = sorted(folder.iterdir()), ledger.view()
    assert found(folder)["folder"].is_good
    assert sorted(folder.iterdir()) == before
    assert ledger.view() == view


def test_a_folder_that_is_not_there_is_good_where_it_can_be_made(tmp_path: Path) -> None:
    folder = found(tmp_path / "a" / "kv")["folder"]
    assert folder.is_good
    assert "the first engine makes it" in folder.text
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_bad(tmp_path: Path) -> None:
    assert "set KVCACHED_DIR to a folder that this user may write" in problem(Path("/proc/kv"))
    (tmp_path / "file").touch()
    assert "Not a directory" in problem(tmp_path / "file" / "kv")
    assert "is not a folder of this user" in problem(tmp_path / "file")


def test_a_folder_that_others_may_look_into_is_bad(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    assert "is open to other users (mode 0755); allowed is 0700" in problem(tmp_path)


def test_a_folder_whose_name_leaves_no_room_for_a_gpus_sockets_is_bad(tmp_path: Path) -> None:
    assert "is too long" in problem(tmp_path / ("x" * 100))


def test_a_folder_without_room_is_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert "No space left on device" in problem(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_ledger_of_another_version_is_bad(ledger: Ledger) -> None:
    words = memoryview(bytearray(ledger.path.read_bytes())).cast("q")
    words[1] += 1
    other = ledger.path.with_name("GPU-1.ledger")
    other.write_bytes(words.tobytes())
    finding = found(ledger.path.parent)["GPU-1.ledger"]
    assert not finding.is_good
    ours = ledger_file.VERSION
    assert f"is of version {ours + 1}, this kvcached writes version {ours}" in finding.text


def test_a_pool_of_another_size_is_said(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVCACHED_HOST_POOL", "2GiB")
    text = found(ledger.path.parent)["host.ledger"].text
    assert "the settings here say 2 GiB" in text
    assert f"KVCACHED_HOST_POOL={GIB}" in text
    monkeypatch.setenv("KVCACHED_HOST_POOL", "1GiB")
    assert found(ledger.path.parent)["host.ledger"].text == "1 GiB shared by llama"


def test_a_pool_that_the_process_may_not_fill_is_bad(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "memory.max"
    monkeypatch.setattr(
        "kvcached_core.memory.host_memory.host_memory", lambda: HostMemory(24 * GIB, 3 * GIB, file)
    )
    monkeypatch.setenv("KVCACHED_HOST_POOL", "2GiB")
    monkeypatch.setenv("KVCACHED_HOST_BUDGET", "1GiB")
    memory = found(tmp_path / "kv")["memory"]
    assert memory.is_good
    assert memory.text == (
        f"3 GiB may be used ({file} limits it; the machine has 24 GiB); "
        "engines on the host share 2 GiB"
    )
    monkeypatch.setenv("KVCACHED_HOST_BUDGET", "2GiB")
    assert found(tmp_path / "kv")["memory"].text.endswith(
        "; engines on the host share 2 GiB, and copies of weights and offloaded caches may take "
        "2 GiB more: where both are used, lower KVCACHED_HOST_POOL or KVCACHED_HOST_BUDGET"
    )
    monkeypatch.setenv("KVCACHED_HOST_POOL", "4GiB")
    memory = found(tmp_path / "kv")["memory"]
    assert not memory.is_good
    assert "KVCACHED_HOST_POOL=4 GiB is more than the process may use" in memory.text


def test_host_copies_are_said_with_their_room_and_who_has_them(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ledger.path.parent
    monkeypatch.setenv("KVCACHED_HOST_BUDGET", "4GiB")
    room = shutil.disk_usage(folder)._replace(free=GIB)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: room)
    before = sorted(folder.iterdir())
    copies = found(folder)["host copies"]
    assert copies.is_good
    assert f"{folder / 'weights'}, 1 GiB free; the first engine" in copies.text
    assert "3 GiB less than the budget allows" in copies.text
    assert "Docker: raise --shm-size" in copies.text
    assert sorted(folder.iterdir()) == before
    assert found(folder)["host budget"].text == "0 B of 4 GiB in use"
    claim = HostBudget(Config(dir=folder, host_budget=4 * GIB)).claim("llama", 3 * GIB)
    assert found(folder)["host budget"].text == "3 GiB of 4 GiB in use: llama 3 GiB"
    assert "less than the budget" not in found(folder)["host copies"].text
    claim.close()


def test_a_folder_of_copies_that_cannot_be_used_is_bad_where_weights_are_yielded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights").chmod(0o755)
    tmp_path.chmod(0o700)
    assert found(tmp_path)["host copies"].is_good
    monkeypatch.setenv("KVCACHED_WEIGHTS", "yield")
    copies = found(tmp_path)["host copies"]
    assert not copies.is_good
    assert "KVCACHED_WEIGHTS_DIR=" in copies.text
    assert "is open to other users (mode 0755)" in copies.text


def test_a_limit_of_locked_memory_and_a_disk_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(survey, "pinnable_bytes", lambda: 8 * MIB)
    monkeypatch.setattr(survey, "_file_system", lambda *_: "ext4")
    seen = found(tmp_path / "kv")
    assert "8 MiB of memory may be locked" in seen["pinning"].text
    assert "it is on ext4: a folder in memory serves faster" in seen["host copies"].text
    monkeypatch.setattr(survey, "pinnable_bytes", lambda: None)
    assert found(tmp_path / "kv")["pinning"].text == "no limit of locked memory"


def test_nodes_of_memory_are_said_where_there_are_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(survey, "memory_nodes", lambda: {0: "0-7"})
    assert "NUMA" not in found(tmp_path / "kv")
    monkeypatch.setattr(survey, "memory_nodes", lambda: {0: "0-7", 1: "8-15"})
    assert "nodes 0 with CPUs 0-7, 1 with CPUs 8-15" in found(tmp_path / "kv")["NUMA"].text


def test_an_adapter_that_fails_is_named_and_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = doctor.GROUP
    broken = EntryPoint("broken", "no_such_package:findings", group)
    working = EntryPoint("working", "tests_of_kvcached:findings", group)
    module = ModuleType("tests_of_kvcached")
    module.findings = lambda: [(True, "every hook fits")]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(doctor, "entry_points", lambda **_: [working, broken])
    seen = found(tmp_path)
    assert seen["working"].is_good
    assert not seen["broken"].is_good
    assert "no_such_package:findings fails: ModuleNotFoundError" in seen["broken"].text
