"""The ledger: promises within the capacity, and nothing kept for the dead."""

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcached_core import ledger_file
from kvcached_core.errors import LedgerError
from kvcached_core.ledger import Ledger, doorbell_path, ledger_directory
from kvcached_core.units import GIB, MIB

PAGE = 16 * MIB


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return ledger_directory(tmp_path / "kv")


@pytest.fixture
def ledger(directory: Path) -> Iterator[Ledger]:
    with Ledger(directory / "host.ledger", GIB) as opened:
        yield opened


def fill(ledger: Ledger, row: int, num_bytes: int, *, used: int = 0, cached: int = 0) -> None:
    assert ledger.reserve(row, num_bytes, PAGE) == num_bytes
    ledger.settle(row, mapped_bytes=num_bytes, used_bytes=used, cached_bytes=cached)


def test_a_promise_becomes_resident_and_goes_back(ledger: Ledger) -> None:
    row = ledger.register(name="a", engine="test")
    assert ledger.reserve(row, 3 * PAGE, PAGE) == 3 * PAGE
    assert ledger.view().free_bytes == GIB - 3 * PAGE
    ledger.settle(row, mapped_bytes=2 * PAGE, used_bytes=PAGE, cached_bytes=0)
    ledger.cancel(row, PAGE)
    (seen,) = ledger.view().instances
    assert (seen.resident_bytes, seen.used_bytes, seen.idle_bytes) == (2 * PAGE, PAGE, PAGE)
    assert seen.promised_bytes == 0
    ledger.settle(row, unmapped_bytes=2 * PAGE, used_bytes=0, cached_bytes=0)
    assert ledger.view().free_bytes == GIB


def test_resident_is_used_plus_cached_plus_idle_whatever_is_reported(ledger: Ledger) -> None:
    row = ledger.register(name="a", engine="test")
    fill(ledger, row, 2 * PAGE, used=5 * PAGE, cached=PAGE)
    (seen,) = ledger.view().instances
    assert seen.resident_bytes == seen.used_bytes + seen.cached_bytes + seen.idle_bytes
    assert min(seen.used_bytes, seen.cached_bytes, seen.idle_bytes) >= 0


def test_promises_of_all_instances_never_exceed_the_capacity(ledger: Ledger) -> None:
    first = ledger.register(name="a", engine="test")
    second = ledger.register(name="b", engine="test")
    assert ledger.reserve(first, GIB - 2 * PAGE, PAGE) == GIB - 2 * PAGE
    assert ledger.reserve(second, 5 * PAGE, PAGE) == 2 * PAGE
    assert ledger.reserve(second, PAGE, PAGE) == 0


def test_a_limit_holds_for_resident_and_promised_bytes_together(ledger: Ledger) -> None:
    row = ledger.register(name="a", engine="test", limit_bytes=3 * PAGE + 1)
    fill(ledger, row, 2 * PAGE)
    assert ledger.reserve(row, 9 * PAGE, PAGE) == PAGE
    assert ledger.reserve(row, PAGE, PAGE) == 0


def test_a_name_is_taken_while_its_owner_lives(ledger: Ledger) -> None:
    row = ledger.register(name="a", engine="test")
    with pytest.raises(LedgerError, match=f"'a' .pid {os.getpid()}"):
        ledger.register(name="a", engine="test")
    second = ledger.register(name="b", engine="test")
    ledger.unregister(row)
    assert ledger.register(name="a", engine="test") == row
    ledger.unregister(second)


def test_the_last_to_leave_removes_the_file(ledger: Ledger, directory: Path) -> None:
    first = ledger.register(name="a", engine="test")
    second = ledger.register(name="b", engine="test")
    ledger.unregister(first)
    assert ledger.path.exists()
    ledger.unregister(second)
    assert list(directory.iterdir()) == []


def test_all_rows_taken_is_said_plainly(ledger: Ledger) -> None:
    for number in range(ledger_file.NUM_ROWS):
        ledger.register(name=f"i{number}", engine="test")
    with pytest.raises(LedgerError, match="all 64 rows"):
        ledger.register(name="one more", engine="test")


CHILD = """
import sys, time
from pathlib import Path
from kvcached_core.ledger import Ledger
ledger = Ledger(Path(sys.argv[1]), 1 << 30)
row = ledger.register(name="child", engine="test")
print(ledger.reserve(row, 1 << 29, 1 << 24), flush=True)
ledger.settle(row, mapped_bytes=1 << 28, used_bytes=0, cached_bytes=0)
print("ready", flush=True)
sys.stdin.read()
"""


def start_child(ledger: Ledger, script: str = CHILD) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(ledger.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    while child.stdout.readline().strip() not in ("ready", ""):
        pass
    return child


def test_bytes_of_a_killed_owner_come_back_within_a_moment(ledger: Ledger) -> None:
    row = ledger.register(name="a", engine="test")
    child = start_child(ledger)
    assert ledger.view().free_bytes == GIB // 2
    bell = doorbell_path(ledger.path, 1)
    bell.touch()
    child.kill()
    child.communicate()
    start, granted = time.monotonic(), 0
    while granted < GIB:
        granted += ledger.reserve(row, GIB - granted, PAGE)
        assert time.monotonic() - start < 0.1
    assert [seen.name for seen in ledger.view().instances] == ["a"]
    assert not bell.exists()


def test_a_row_lives_while_any_process_that_holds_its_memory_does(ledger: Ledger) -> None:
    owner = start_child(ledger)
    ledger.join(0)
    owner.kill()
    owner.communicate()
    assert [seen.name for seen in ledger.view().instances] == ["child"]


def test_a_lock_dies_with_its_holder(ledger: Ledger) -> None:
    script = CHILD.replace('print("ready"', 'ledger._lock.__enter__(); print("ready"')
    child = start_child(ledger, script)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert ledger.view().instances == ()


def test_a_recycled_pid_is_not_the_owner(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvcached_core.ledger.start_time", lambda _pid: 1)
    ledger.register(name="old", engine="test")
    assert ledger.view().instances == ()


def test_asking_takes_from_the_longest_unused_and_only_what_nobody_needs(ledger: Ledger) -> None:
    asker = ledger.register(name="asker", engine="test")
    old = ledger.register(name="old", engine="test")
    young = ledger.register(name="young", engine="test")
    fill(ledger, old, 4 * PAGE, used=PAGE, cached=2 * PAGE)
    fill(ledger, young, 4 * PAGE, used=4 * PAGE)
    assert ledger.ask_peers(asker, 2 * PAGE) == [old]
    assert ledger.asked_bytes(old) == 2 * PAGE
    assert ledger.ask_peers(asker, 2 * PAGE) == []  # it was asked already
    assert ledger.ask_peers(asker, 9 * PAGE) == [old]
    assert ledger.asked_bytes(old) == 3 * PAGE
    assert ledger.asked_bytes(young) == 0
    ledger.answer(old)
    assert ledger.asked_bytes(old) == 0


def test_an_instance_at_its_limit_asks_nobody(ledger: Ledger) -> None:
    asker = ledger.register(name="asker", engine="test", limit_bytes=2 * PAGE)
    peer = ledger.register(name="peer", engine="test")
    fill(ledger, peer, 4 * PAGE, cached=4 * PAGE)
    fill(ledger, asker, PAGE, used=PAGE)
    assert ledger.ask_peers(asker, 3 * PAGE) == [peer]
    assert ledger.asked_bytes(peer) == PAGE
    ledger.reserve(asker, PAGE, PAGE)
    ledger.answer(peer)
    assert ledger.ask_peers(asker, PAGE) == []


def test_another_pool_size_is_refused_while_somebody_uses_this_one(directory: Path) -> None:
    with Ledger(directory / "host.ledger", GIB) as ledger:
        row = ledger.register(name="a", engine="test")
        with pytest.raises(LedgerError, match="KVCACHED_HOST_POOL") as caught:
            Ledger(ledger.path, 2 * GIB)
        assert "2 GiB" in str(caught.value)
        assert "'a'" in str(caught.value)
        ledger.unregister(row)
    with Ledger(directory / "host.ledger", 2 * GIB) as ledger:
        assert ledger.capacity_bytes == 2 * GIB


def test_files_and_folder_are_for_their_user_alone(ledger: Ledger, directory: Path) -> None:
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE(ledger.path.stat().st_mode) == 0o600


def test_an_open_folder_is_refused(directory: Path) -> None:
    directory.chmod(0o755)
    with pytest.raises(LedgerError, match=r"0755.*allowed is 0700"):
        ledger_directory(directory)


def test_a_link_in_place_of_the_folder_or_file_is_refused(tmp_path: Path) -> None:
    real = ledger_directory(tmp_path / "real")
    (tmp_path / "link").symlink_to(real)
    with pytest.raises(LedgerError, match="not a folder"):
        ledger_directory(tmp_path / "link")
    (real / "host.ledger").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LedgerError, match="cannot be opened"):
        Ledger(real / "host.ledger", GIB)


def test_a_missing_ledger_is_said_by_its_path(directory: Path) -> None:
    with pytest.raises(LedgerError, match=r"host\.ledger cannot be opened: No such file"):
        Ledger(directory / "host.ledger")


def test_a_damaged_or_foreign_file_is_refused(ledger: Ledger, directory: Path) -> None:
    ledger._header.version = 99
    with pytest.raises(LedgerError, match="version 99, this kvcached writes version 2"):
        Ledger(ledger.path)
    ledger._header.magic = 1
    with pytest.raises(LedgerError, match="unknown"):
        Ledger(ledger.path)
    (directory / "short.ledger").write_bytes(b"x")
    with pytest.raises(LedgerError, match="has 1 bytes"):
        Ledger(directory / "short.ledger")


def test_a_row_that_was_removed_cannot_be_used(ledger: Ledger) -> None:
    row = ledger.register(name="a", engine="test")
    ledger.unregister(row)
    with pytest.raises(LedgerError, match="has no instance"):
        ledger.reserve(row, PAGE, PAGE)
