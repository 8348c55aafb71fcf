"""The doctor says of a tier on disk whether it is slower than the engine that it is for."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcached_core.cli import disk_tiers
from kvcached_core.cli.disk_tiers import examine_disks, read_speed
from kvcached_core.cli.doctor import examine
from kvcached_core.config import read_config
from kvcached_core.units import GIB, MIB
from kvcached_core.weights.host_tier import DiskTier, HostTier, TierCounts

COUNTS = TierCounts("host", stored_bytes=GIB)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of ledgers that the settings name."""
    made = tmp_path / "kv"
    monkeypatch.setenv("KVCACHED_DIR", str(made))
    return made


@pytest.fixture
def tier(folder: Path) -> Iterator[HostTier]:
    config = read_config({"KVCACHED_DIR": str(folder)})
    made = HostTier.reserve(config, "small", MIB, setting="--kv-offloading-size")
    yield made
    made.close()


def fill(folder: Path, num_bytes: int) -> str:
    """Write chunks in folders, as a tier does; one file more is no chunk."""
    for number in range(num_bytes // (4 * MIB)):
        path = folder / f"{number % 3:03}" / f"{number}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(4 * MIB))
    (folder / "config.json").write_text("{}")
    return str(folder)


def said(folder: Path) -> tuple[bool, str]:
    (found,) = examine_disks(folder)
    return found


def test_a_disk_that_is_slower_than_its_engine_is_named_with_both_speeds(
    folder: Path, tier: HostTier, tmp_path: Path
) -> None:
    disk = fill(tmp_path / "disk", 32 * MIB)
    tier.note([COUNTS], [DiskTier(disk, 1e15)])
    is_good, text = said(folder)
    assert not is_good
    assert text.startswith(f"the tier of small in {disk} reads ")
    assert "come back later than they are computed; offload to host memory alone" in text
    finding = next(one for one in examine(folder) if one.what == "disk tier")
    assert not finding.is_good
    assert finding.text.startswith("the tier of small")


def test_one_that_is_faster_is_as_it_should_be(
    folder: Path, tier: HostTier, tmp_path: Path
) -> None:
    tier.note([COUNTS], [DiskTier(fill(tmp_path / "disk", 32 * MIB), 1000.0)])
    is_good, text = said(folder)
    assert is_good
    assert "its engine computes 1000 B a second of KV cache" in text


def test_nothing_is_judged_before_a_prompt_was_computed_and_files_are_there(
    folder: Path, tier: HostTier, tmp_path: Path
) -> None:
    disk = fill(tmp_path / "disk", 4 * MIB)
    tier.note([COUNTS], [DiskTier(disk)])
    is_good, text = said(folder)
    assert is_good
    assert text.startswith(f"the tier of small in {disk} was not compared with its engine yet")
    for path in (disk, "/nowhere"):
        tier.note([COUNTS], [DiskTier(path, 1e15)])
        is_good, text = said(folder)
        assert is_good
        assert text.endswith("has less than 16 MiB that can be read here")


def test_an_engine_without_such_a_tier_has_no_finding(folder: Path, tier: HostTier) -> None:
    tier.note([COUNTS])
    assert list(examine_disks(folder)) == []


def test_a_tier_of_more_folders_than_files_are_looked_at_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(16):
        path = tmp_path / f"{number:03}" / "0_g0" / "chunk.bin"
        path.parent.mkdir(parents=True)
        path.write_bytes(os.urandom(2 * MIB))
    monkeypatch.setattr(disk_tiers, "MAX_FILES", 8)
    assert read_speed(tmp_path)


def test_a_tier_of_folders_whose_files_were_removed_is_not_gone_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    walked: list[str] = []
    walk = os.walk

    def count(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
        for found in walk(folder):
            walked.append(found[0])
            yield found

    monkeypatch.setattr(disk_tiers.os, "walk", count)
    monkeypatch.setattr(disk_tiers, "MAX_FOLDERS", 8)
    for number in range(16):
        (tmp_path / f"{number:03}" / "0_g0").mkdir(parents=True)
    assert read_speed(tmp_path) is None
    assert len(walked) == 8


def test_reading_is_bounded_and_bears_files_that_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(fill(tmp_path / "disk", 64 * MIB))
    monkeypatch.setattr(disk_tiers, "MAX_BYTES", 24 * MIB)
    read: list[Path] = []

    def read_all(path: Path, num_bytes: int) -> int:
        read.append(path)
        if len(read) == 1:
            path.unlink()
        return original(path, num_bytes)

    original = disk_tiers._read
    monkeypatch.setattr(disk_tiers, "_read", read_all)
    assert read_speed(folder) is not None
    assert len(read) == 6


def test_a_file_system_without_direct_reads_is_read_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(fill(tmp_path / "disk", 16 * MIB))
    opened = os.open

    def refuse_direct(path: Path, flags: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return opened(path, flags)

    monkeypatch.setattr(disk_tiers.os, "open", refuse_direct)
    assert read_speed(folder) is not None
