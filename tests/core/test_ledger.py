"""The ledger: promises within the capacity, and nothing kept for the dead."""

import errno
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.waiting import await_that

from kvcached_core.errors import ConfigError, LedgerError, PolicyError
from kvcached_core.ledger import file as ledger_file
from kvcached_core.ledger.file import RowKey
from kvcached_core.ledger.ledger import Ledger, WantedBytes
from kvcached_core.ledger.opening import doorbell_path, ledger_directory
from kvcached_core.ledger.policy import Policy
from kvcached_core.units import GIB, MIB

PAGE = 16 * MIB


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return ledger_directory(tmp_path / "kv")


@pytest.fixture
def ledger(directory: Path) -> Iterator[Ledger]:
    with Ledger(directory / "host.ledger", GIB) as opened:
        yield opened


def fill(ledger: Ledger, row: RowKey, num_bytes: int, *, used: int = 0, cached: int = 0) -> None:
    assert ledger.promise(row, num_bytes, PAGE) == num_bytes
    ledger.settle(row, mapped_bytes=num_bytes, used_bytes=used, cached_bytes=cached)


def test_a_promise_becomes_resident_and_goes_back(ledger: Ledger) -> None:
    row = ledger.register(name="a", engine="test")
    assert ledger.promise(row, 3 * PAGE, PAGE) == 3 * PAGE
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
    assert ledger.promise(first, GIB - 2 * PAGE, PAGE) == GIB - 2 * PAGE
    assert ledger.promise(second, 5 * PAGE, PAGE) == 2 * PAGE
    assert ledger.promise(second, PAGE, PAGE) == 0


def test_a_limit_holds_for_resident_and_promised_bytes_together(ledger: Ledger) -> None:
    row = ledger.register(name="a", engine="test", policy=Policy(3 * PAGE + 1))
    fill(ledger, row, 2 * PAGE)
    assert ledger.promise(row, 9 * PAGE, PAGE) == PAGE
    assert ledger.promise(row, PAGE, PAGE) == 0


def test_a_name_is_taken_while_its_owner_lives(ledger: Ledger) -> None:
    row = ledger.register(name="a", engine="test")
    with pytest.raises(LedgerError, match=f"'a' .pid {os.getpid()}"):
        ledger.register(name="a", engine="test")
    second = ledger.register(name="b", engine="test")
    ledger.unregister(row)
    again = ledger.register(name="a", engine="test")
    assert again.number == row.number
    assert again != row
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
        ledger.register(name="one-more", engine="test")


CHILD = """
import sys, time
from pathlib import Path
from kvcached_core.ledger.ledger import Ledger
ledger = Ledger(Path(sys.argv[1]), 1 << 30)
row = ledger.register(name="child", engine="test")
print(ledger.promise(row, 1 << 29, 1 << 24), flush=True)
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
    bell = doorbell_path(ledger.path, RowKey(1, 0))
    bell.touch()
    child.kill()
    child.communicate()
    granted = 0

    def is_all_promised() -> bool:
        nonlocal granted
        granted += ledger.promise(row, GIB - granted, PAGE)
        return granted == GIB

    await_that(is_all_promised)
    assert [seen.name for seen in ledger.view().instances] == ["a"]
    assert not bell.exists()


def test_a_row_lives_while_any_process_that_holds_its_memory_does(ledger: Ledger) -> None:
    owner = start_child(ledger)
    ledger.join(ledger.view().instances[0].row)
    owner.kill()
    owner.communicate()
    assert [seen.name for seen in ledger.view().instances] == ["child"]


def test_a_lock_dies_with_its_holder(ledger: Ledger) -> None:
    script = CHILD.replace('print("ready"', 'ledger._enter(1.0); print("ready"')
    child = start_child(ledger, script)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert ledger.view().instances == ()


def test_asking_takes_from_the_longest_unused_and_only_what_nobody_needs(ledger: Ledger) -> None:
    asker = ledger.register(name="asker", engine="test")
    old = ledger.register(name="old", engine="test")
    young = ledger.register(name="young", engine="test")
    fill(ledger, old, 4 * PAGE, used=PAGE, cached=2 * PAGE)
    fill(ledger, young, 4 * PAGE, used=4 * PAGE)
    assert ledger.ask_peers(asker, 2 * PAGE) == [old]
    assert ledger.wanted(old).asked_bytes == 2 * PAGE
    noticed = ledger.num_notices(old)
    assert ledger.ask_peers(asker, 2 * PAGE) == [old]  # not for more, but it did not hear the ring
    assert ledger.num_notices(old) > noticed
    assert ledger.wanted(old).asked_bytes == 2 * PAGE
    assert ledger.ask_peers(asker, 2 * PAGE, is_waiting=False) == []
    assert ledger.ask_peers(asker, 9 * PAGE) == [old]
    assert ledger.wanted(old).asked_bytes == 3 * PAGE
    assert ledger.wanted(young).asked_bytes == 0
    ledger.acknowledge(old)
    assert ledger.wanted(old).asked_bytes == 0


def test_what_is_on_its_way_is_not_asked_for_again(ledger: Ledger) -> None:
    asker = ledger.register(name="asker", engine="test")
    holder = ledger.register(name="holder", engine="test")
    fill(ledger, holder, GIB, cached=GIB)
    assert ledger.ask_peers(asker, 4 * PAGE) == [holder]
    ledger.acknowledge(holder, 4 * PAGE, num_asked=ledger.wanted(holder).num_asked)
    assert ledger.ask_peers(asker, 4 * PAGE) == []
    assert ledger.wanted(holder).asked_bytes == 0
    left = GIB - 4 * PAGE
    assert ledger.settle(holder, unmapped_bytes=4 * PAGE, used_bytes=0, cached_bytes=left) == [
        asker
    ]
    assert ledger.ask_peers(asker, 4 * PAGE) == [holder]  # another one was quicker


def test_an_answer_leaves_what_was_asked_since(ledger: Ledger) -> None:
    asker = ledger.register(name="asker", engine="test")
    holder = ledger.register(name="holder", engine="test")
    fill(ledger, holder, GIB, cached=GIB)
    ledger.ask_peers(asker, 4 * PAGE)
    seen = ledger.wanted(holder)
    ledger.ask_peers(asker, 6 * PAGE)
    ledger.acknowledge(holder, seen.asked_bytes, num_asked=seen.num_asked)
    assert ledger.wanted(holder).asked_bytes == 2 * PAGE


def test_an_instance_at_its_limit_asks_nobody(ledger: Ledger) -> None:
    asker = ledger.register(name="asker", engine="test", policy=Policy(2 * PAGE))
    peer = ledger.register(name="peer", engine="test")
    fill(ledger, peer, 4 * PAGE, cached=4 * PAGE)
    fill(ledger, asker, PAGE, used=PAGE)
    assert ledger.ask_peers(asker, 3 * PAGE) == [peer]
    assert ledger.wanted(peer).asked_bytes == PAGE
    ledger.promise(asker, PAGE, PAGE)
    ledger.acknowledge(peer)
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


def test_another_version_is_refused_and_left_as_it_is(ledger: Ledger) -> None:
    ledger._header.version = 99
    for capacity_bytes in (None, GIB):
        with pytest.raises(LedgerError, match="version 99, this kvcached writes version 4"):
            Ledger(ledger.path, capacity_bytes)


def clear_magic(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(bytes(8))


def cut_off(path: Path) -> None:
    os.truncate(path, 100)


def break_header(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(16)
        file.write((10**6).to_bytes(8, "little"))


@pytest.mark.parametrize("damage", [clear_magic, cut_off, break_header])
def test_a_damaged_file_is_set_aside_and_its_live_owners_move_to_the_new_one(
    directory: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    path = directory / "host.ledger"
    with Ledger(path, GIB) as old, Ledger(path) as reader:
        row = old.register(name="old", engine="test", policy=Policy(floor_bytes=PAGE))
        fill(old, row, 3 * PAGE, used=PAGE)
        damage(path)
        with pytest.raises(LedgerError, match="damaged"):
            Ledger(path)
        with Ledger(path, GIB) as new:
            assert "is set aside as host.damaged-" in caplog.text
            other = new.register(name="new", engine="test")
            assert other.number != row.number  # somebody keeps that one alive still
            if damage is break_header:
                old._header.magic = 0  # what setting aside does to a file that is mapped
            old.cancel(row, 0)
            assert new.promise(other, GIB, PAGE) == GIB - 3 * PAGE
        assert [seen.name for seen in reader.view().instances] == ["old"]


@pytest.mark.parametrize("damage", [clear_magic, cut_off])
def test_an_engine_that_serves_survives_the_damage_of_its_ledger(
    directory: Path, damage: Callable[[Path], None]
) -> None:
    path = directory / "host.ledger"
    with Ledger(path, GIB) as engine, Ledger(path) as worker:
        row = engine.register(name="a", engine="test", policy=Policy(priority=7))
        worker.join(row)
        fill(engine, row, 2 * PAGE, used=PAGE)
        worker.settle(row, mapped_bytes=0, used_bytes=2 * PAGE, cached_bytes=0)
        damage(path)
        engine.num_notices(row)
        assert engine.promise(row, PAGE, PAGE) == PAGE
        worker.settle(row, mapped_bytes=PAGE, used_bytes=3 * PAGE, cached_bytes=0)
        (seen,) = engine.view().instances
    assert (seen.name, seen.priority, seen.resident_bytes) == ("a", 7, 3 * PAGE)
    assert (seen.used_bytes, seen.promised_bytes) == (3 * PAGE, 0)


@pytest.mark.parametrize("num_later_changes", [0, 1, 3])
@pytest.mark.parametrize("is_worker_first", [False, True])
def test_what_scheduler_and_worker_knew_before_a_damage_adds_up_whoever_comes_first(
    directory: Path, num_later_changes: int, *, is_worker_first: bool
) -> None:
    path = directory / "host.ledger"
    with Ledger(path, GIB) as scheduler, Ledger(path) as worker:
        row = scheduler.register(name="a", engine="test")
        worker.join(row)
        assert scheduler.promise(row, 4 * PAGE, PAGE) == 4 * PAGE
        worker.settle(row, mapped_bytes=3 * PAGE, used_bytes=3 * PAGE, cached_bytes=0)
        for _ in range(num_later_changes):
            scheduler.clear_waiting(row)
            scheduler.announce(row, 0)
        cut_off(path)

        def step() -> None:
            worker.settle(row, mapped_bytes=PAGE, used_bytes=4 * PAGE, cached_bytes=0)

        def schedule() -> None:
            assert scheduler.promise(row, PAGE, PAGE) == PAGE
            for _ in range(num_later_changes):
                scheduler.announce(row, 0)

        for call in (step, schedule) if is_worker_first else (schedule, step):
            call()
        worker.settle(row, unmapped_bytes=PAGE, used_bytes=3 * PAGE, cached_bytes=0)
        (seen,) = scheduler.view().instances
        assert (seen.resident_bytes, seen.promised_bytes) == (3 * PAGE, PAGE)
        assert seen.used_bytes == 3 * PAGE
        assert scheduler.promise(row, GIB, PAGE) == GIB - 4 * PAGE


def test_no_room_for_the_file_is_said_plainly(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(LedgerError, match="No space left on device; 33280 bytes are needed"):
        Ledger(directory / "host.ledger", GIB)
    assert list(directory.iterdir()) == []


def test_a_floor_is_kept_free_for_its_owner(ledger: Ledger) -> None:
    owner = ledger.register(name="owner", engine="test", policy=Policy(floor_bytes=4 * PAGE))
    other = ledger.register(name="other", engine="test")
    assert ledger.promise(other, GIB, PAGE) == GIB - 4 * PAGE
    assert ledger.promise(owner, 4 * PAGE, PAGE) == 4 * PAGE


def test_a_request_that_waits_borrows_of_a_floor_until_its_owner_waits(ledger: Ledger) -> None:
    owner = ledger.register(name="owner", engine="test", policy=Policy(floor_bytes=4 * PAGE))
    other = ledger.register(name="other", engine="test")
    fill(ledger, other, GIB - 4 * PAGE, used=GIB - 4 * PAGE)
    assert ledger.promise(other, PAGE, PAGE) == 0
    assert ledger.promise(other, 0, PAGE, spare_bytes=PAGE) == 0
    assert ledger.promise(other, PAGE, PAGE, spare_bytes=PAGE, is_waiting=True) == PAGE
    ledger.settle(other, mapped_bytes=PAGE, used_bytes=GIB - 3 * PAGE, cached_bytes=0)
    assert ledger.promise(owner, 4 * PAGE, PAGE, is_waiting=True) == 3 * PAGE
    assert ledger.ask_peers(owner, PAGE) == [other]  # its requests stop for what was borrowed
    assert ledger.wanted(other).owed_bytes == PAGE
    ledger.settle(other, unmapped_bytes=PAGE, used_bytes=GIB - 4 * PAGE, cached_bytes=0)
    assert ledger.promise(other, PAGE, PAGE, is_waiting=True) == 0  # it is the owner's now
    assert ledger.promise(owner, PAGE, PAGE, is_waiting=True) == PAGE


def test_a_request_that_waits_gets_what_lies_cached_below_a_floor(ledger: Ledger) -> None:
    owner = ledger.register(name="owner", engine="test", policy=Policy(floor_bytes=GIB))
    other = ledger.register(name="other", engine="test")
    fill(ledger, owner, GIB, cached=GIB)
    assert ledger.promise(other, PAGE, PAGE, is_waiting=True) == 0
    assert ledger.ask_peers(other, PAGE, is_waiting=False) == []
    assert ledger.ask_peers(other, PAGE, is_static=True) == []  # weights could not go back
    assert ledger.ask_peers(other, PAGE) == [owner]
    waiting = ledger.settle(owner, unmapped_bytes=PAGE, used_bytes=0, cached_bytes=GIB - PAGE)
    assert waiting == [other]
    assert ledger.promise(other, PAGE, PAGE, is_waiting=True) == PAGE


def test_the_longest_request_of_each_instance_fits_beside_the_others_floors(
    ledger: Ledger,
) -> None:
    owner = ledger.register(name="owner", engine="test", policy=Policy(floor_bytes=GIB // 2))
    other = ledger.register(name="other", engine="test")
    with pytest.raises(
        PolicyError, match=r"'other' needs 528 MiB, but floors of 512 MiB \(owner\) leave 512 MiB"
    ):
        ledger.describe(other, page_bytes=PAGE, virtual_bytes=GIB, least_bytes=GIB // 2 + PAGE)
    ledger.describe(other, page_bytes=PAGE, virtual_bytes=GIB, least_bytes=GIB // 2)
    with pytest.raises(PolicyError, match="the longest request of 'other' needs 512 MiB"):
        ledger.change_policy(owner, floor_bytes=GIB // 2 + PAGE)
    with pytest.raises(PolicyError, match="the longest request of 'other' needs 512 MiB"):
        ledger.register(name="third", engine="test", policy=Policy(floor_bytes=PAGE))
    ledger.change_policy(owner, floor_bytes=GIB // 2 + PAGE, is_forced=True)
    assert ledger.view().instances[0].floor_bytes == GIB // 2 + PAGE


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (Policy(limit_bytes=2 * GIB), "above what all instances share, 1 GiB"),
        (Policy(limit_bytes=PAGE), "below what its largest request needs, 32 MiB"),
        (Policy(limit_bytes=4 * PAGE, floor_bytes=5 * PAGE), "floor must not be above the limit"),
        (Policy(priority=1001), "use -1000 to 1000"),
        (
            Policy(floor_bytes=GIB // 2 + PAGE),
            r"floors of 528 MiB \(a\) \+ 512 MiB \(b\) = 1.02 GiB are more .* up to 512 MiB",
        ),
    ],
)
def test_a_policy_that_cannot_hold_is_refused_and_changes_nothing(
    ledger: Ledger, policy: Policy, message: str
) -> None:
    row = ledger.register(name="a", engine="test", policy=Policy(floor_bytes=PAGE))
    ledger.describe(row, page_bytes=PAGE, virtual_bytes=GIB, least_bytes=2 * PAGE)
    ledger.register(name="b", engine="test", policy=Policy(floor_bytes=GIB // 2))
    with pytest.raises(PolicyError, match=message):
        ledger.change_policy(row, **vars(policy))
    assert ledger.view().instances[0].policy == Policy(floor_bytes=PAGE)


def test_who_waits_is_named_when_memory_comes_free(ledger: Ledger) -> None:
    holder = ledger.register(name="holder", engine="test")
    asker = ledger.register(name="asker", engine="test")
    fill(ledger, holder, GIB, cached=GIB)
    assert ledger.promise(asker, PAGE, PAGE) == 0
    assert ledger.ask_peers(asker, PAGE) == [holder]
    assert ledger.settle(holder, used_bytes=0, cached_bytes=GIB) == []
    waiting = ledger.settle(holder, unmapped_bytes=PAGE, used_bytes=0, cached_bytes=GIB)
    assert waiting == [asker]
    assert ledger.promise(asker, PAGE, PAGE) == PAGE
    assert ledger.settle(holder, unmapped_bytes=PAGE, used_bytes=0, cached_bytes=GIB) == []


def test_spare_memory_is_left_to_who_waits_for_it(ledger: Ledger) -> None:
    holder = ledger.register(name="holder", engine="test")
    asker = ledger.register(name="asker", engine="test")
    fill(ledger, holder, GIB, used=GIB)
    assert ledger.promise(asker, 3 * PAGE, PAGE) == 0
    ledger.ask_peers(asker, 3 * PAGE)
    ledger.settle(holder, unmapped_bytes=4 * PAGE, used_bytes=GIB - 4 * PAGE, cached_bytes=0)
    assert ledger.promise(holder, 0, PAGE, spare_bytes=4 * PAGE) == PAGE
    ledger.cancel(holder, PAGE)
    assert ledger.promise(holder, 2 * PAGE, PAGE, spare_bytes=4 * PAGE) == 2 * PAGE  # it needs them
    ledger.cancel(holder, 2 * PAGE)
    assert ledger.promise(asker, 3 * PAGE, PAGE, spare_bytes=4 * PAGE) == 4 * PAGE
    assert ledger.view().instances[1].waiting_bytes == 0


def test_who_waits_goes_on_waiting_when_there_is_nothing_to_spare(ledger: Ledger) -> None:
    holder = ledger.register(name="holder", engine="test")
    asker = ledger.register(name="asker", engine="test")
    fill(ledger, holder, GIB, used=GIB)
    ledger.ask_peers(asker, PAGE)
    assert ledger.promise(asker, 0, PAGE, spare_bytes=4 * PAGE) == 0
    assert ledger.view().instances[1].waiting_bytes == PAGE


def test_a_lowered_limit_counts_what_is_about_to_be_mapped(ledger: Ledger) -> None:
    row = ledger.register(name="a", engine="test")
    fill(ledger, row, 3 * PAGE, used=3 * PAGE)
    assert ledger.promise(row, PAGE, PAGE) == PAGE  # ordered, and mapped behind the limit's back
    ledger.change_policy(row, limit_bytes=2 * PAGE)
    assert ledger.wanted(row).owed_bytes == 2 * PAGE


def test_a_lowered_limit_is_owed(ledger: Ledger) -> None:
    row = ledger.register(name="a", engine="test")
    fill(ledger, row, 4 * PAGE, used=4 * PAGE)
    seen = ledger.num_notices(row)
    ledger.change_policy(row, limit_bytes=PAGE)
    assert ledger.num_notices(row) > seen
    assert ledger.wanted(row) == WantedBytes(3 * PAGE, 3 * PAGE, num_asked=0)
    assert ledger.promise(row, PAGE, PAGE) == 0


@pytest.mark.parametrize("name", ["../evil", "a/b", "", "-x", "x" * 65, "a b"])
def test_a_name_that_could_be_a_path_is_refused(ledger: Ledger, name: str) -> None:
    with pytest.raises(ConfigError, match="is not allowed; use letters"):
        ledger.register(name=name, engine="test")


def test_a_row_that_was_removed_cannot_be_used(ledger: Ledger) -> None:
    row = ledger.register(name="a", engine="test")
    ledger.unregister(row)
    with pytest.raises(LedgerError, match="its row is free"):
        ledger.promise(row, PAGE, PAGE)


def test_the_room_is_what_would_be_promised_and_promises_nothing(ledger: Ledger) -> None:
    row = ledger.register(name="a", engine="e", policy=Policy(limit_bytes=4 * PAGE))
    other = ledger.register(name="b", engine="e")
    assert ledger.room_bytes(row) == 4 * PAGE
    assert ledger.room_bytes(other) == GIB
    ledger.promise(other, GIB - 2 * PAGE, PAGE)
    assert ledger.room_bytes(row) == 2 * PAGE
    assert ledger.promise(row, 3 * PAGE, PAGE) == 2 * PAGE
    assert ledger.room_bytes(row) == ledger.room_bytes(other) == 0


def test_who_waits_is_named_for_a_promise_that_needed_no_memory_and_for_one_taken_back(
    ledger: Ledger,
) -> None:
    holder = ledger.register(name="holder", engine="test")
    asker = ledger.register(name="asker", engine="test")
    assert ledger.promise(holder, GIB, PAGE) == GIB
    ledger.ask_peers(asker, 3 * PAGE)
    assert ledger.settle(holder, unneeded_bytes=PAGE, used_bytes=0, cached_bytes=0) == [asker]
    assert ledger.cancel(holder, PAGE) == [asker]
    assert ledger.unregister(holder) == [asker]


def test_only_who_could_have_a_page_of_it_is_woken(ledger: Ledger) -> None:
    holder = ledger.register(name="holder", engine="test")
    large = ledger.register(name="large", engine="test", page_bytes=4 * PAGE)
    small = ledger.register(name="small", engine="test", page_bytes=PAGE)
    fill(ledger, holder, GIB, used=GIB)
    ledger.ask_peers(large, 8 * PAGE)
    ledger.ask_peers(small, 2 * PAGE)
    free = {"used_bytes": GIB, "cached_bytes": 0}
    assert ledger.settle(holder, unmapped_bytes=PAGE // 2, **free) == []
    assert ledger.settle(holder, unmapped_bytes=PAGE, **free) == [small]
    assert ledger.settle(holder, unmapped_bytes=3 * PAGE, **free) == [large, small]


def test_who_waits_is_named_where_a_lower_floor_leaves_memory(ledger: Ledger) -> None:
    owner = ledger.register(name="owner", engine="test", policy=Policy(floor_bytes=GIB))
    asker = ledger.register(name="asker", engine="test")
    ledger.ask_peers(asker, PAGE)
    assert ledger.change_policy(owner, floor_bytes=0).waiting == [asker]


def test_a_change_of_one_word_of_a_policy_leaves_the_others(ledger: Ledger) -> None:
    row = ledger.register(name="a", engine="test", policy=Policy(4 * PAGE, PAGE, 3))
    change = ledger.change_policy(row, limit_bytes=None)
    assert (change.before, change.after) == (Policy(4 * PAGE, PAGE, 3), Policy(None, PAGE, 3))
    ledger.change_policy(row, priority=5)
    assert ledger.view().instances[0].policy == Policy(None, PAGE, 5)


def test_taking_a_change_back_leaves_what_somebody_changed_since(ledger: Ledger) -> None:
    row = ledger.register(name="a", engine="test")
    change = ledger.change_policy(row, limit_bytes=4 * PAGE, priority=3)
    ledger.change_policy(row, limit_bytes=8 * PAGE, floor_bytes=PAGE)
    ledger.undo_policy(row, change)
    assert ledger.view().instances[0].policy == Policy(8 * PAGE, PAGE, 0)


def test_another_headroom_is_named_on_a_gpu(directory: Path) -> None:
    with Ledger(directory / "GPU-1234.ledger", GIB) as ledger:
        ledger.register(name="a", engine="test")
        with pytest.raises(LedgerError, match="every engine the same KVCACHED_HEADROOM, or"):
            Ledger(ledger.path, 2 * GIB)


def test_a_folder_that_somebody_else_made_first_is_refused_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ledger_directory(tmp_path / "kv")
    monkeypatch.setattr("os.geteuid", lambda: os.getuid() + 1)
    with pytest.raises(LedgerError, match=r"belongs to user \d+\); set KVCACHED_DIR"):
        ledger_directory(folder)
