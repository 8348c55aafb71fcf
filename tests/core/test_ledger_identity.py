"""Nothing in a ledger is taken for what it was: neither a row, nor the file, nor a process."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvcached_core import control
from kvcached_core.cli.doctor import examine
from kvcached_core.errors import LedgerError
from kvcached_core.ledger.file import MAGIC, RowKey
from kvcached_core.ledger.ledger import Ledger, sweep
from kvcached_core.ledger.opening import ledger_directory
from kvcached_core.ledger.survey import open_places
from kvcached_core.ledger.weights import WeightsWish
from kvcached_core.units import GIB, MIB

PAGE = 16 * MIB


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return ledger_directory(tmp_path / "kv") / "host.ledger"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    with Ledger(path, GIB) as opened:
        yield opened


def fill(ledger: Ledger, row: RowKey, num_pages: int) -> None:
    size = num_pages * PAGE
    assert ledger.promise(row, size, PAGE) == size
    ledger.settle(row, mapped_bytes=size, used_bytes=size, cached_bytes=0)


def damage(path: Path) -> None:
    os.truncate(path, 100)


CALLS: dict[str, Callable[[Ledger, RowKey], object]] = {
    "promise": lambda ledger, row: ledger.promise(row, PAGE, PAGE),
    "cancel": lambda ledger, row: ledger.cancel(row, PAGE),
    "settle": lambda ledger, row: ledger.settle(
        row, unmapped_bytes=2 * PAGE, used_bytes=0, cached_bytes=0
    ),
    "answer": lambda ledger, row: ledger.acknowledge(row, PAGE),
    "ask": lambda ledger, row: ledger.ask(row, PAGE),
    "ask_peers": lambda ledger, row: ledger.ask_peers(row, PAGE),
    "wanted": lambda ledger, row: ledger.wanted(row),
    "free_bytes": lambda ledger, row: ledger.free_bytes(row),
    "room_bytes": lambda ledger, row: ledger.room_bytes(row),
    "announce": lambda ledger, row: ledger.announce(row, PAGE),
    "announce waking": lambda ledger, row: ledger.announce(row, PAGE, is_waking=True),
    "is_first_waker": lambda ledger, row: ledger.is_first_waker(row),
    "describe": lambda ledger, row: ledger.describe(row, page_bytes=1, virtual_bytes=1),
    "describe_weights": lambda ledger, row: ledger.describe_weights(row, PAGE),
    "settle_weights": lambda ledger, row: ledger.settle_weights(row, mapped_bytes=PAGE),
    "offer_weights": lambda ledger, row: ledger.offer_weights(row, PAGE),
    "activated": lambda ledger, row: ledger.activated(row, 1),
    "set_wish": lambda ledger, row: ledger.set_wish(row, WeightsWish.SLEEP),
    "weights_wish": lambda ledger, row: ledger.weights_wish(row),
    "end_wish": lambda ledger, row: ledger.end_wish(row, WeightsWish.SLEEP),
    "join": lambda ledger, row: ledger.join(row),
    "unregister": lambda ledger, row: ledger.unregister(row),
    "change_policy": lambda ledger, row: ledger.change_policy(row, limit_bytes=PAGE),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_late_process_changes_nothing_of_who_has_its_row_now(ledger: Ledger, call: str) -> None:
    ledger.register(name="stays", engine="test")
    old = ledger.register(name="old", engine="test")
    ledger.unregister(old)
    new = ledger.register(name="new", engine="test")
    assert new.number == old.number
    fill(ledger, new, 3)
    before = ledger.view()
    with pytest.raises(LedgerError, match="'new' has its row now"):
        CALLS[call](ledger, old)
    assert ledger.view() == before
    assert ledger.num_notices(old) == -1


def test_a_late_process_changes_nothing_after_a_repair_either(ledger: Ledger, path: Path) -> None:
    with Ledger(path) as worker:
        stays = ledger.register(name="stays", engine="test")
        old = ledger.register(name="old", engine="test")
        worker.join(old)
        fill(worker, old, 3)
        ledger.unregister(old)
        damage(path)
        fill(ledger, stays, 1)
        with pytest.raises(LedgerError, match="has left"):
            worker.settle(old, unmapped_bytes=PAGE, used_bytes=0, cached_bytes=0)
        new = ledger.register(name="new", engine="test")
        with pytest.raises(LedgerError, match="has left"):
            worker.settle(old, unmapped_bytes=PAGE, used_bytes=0, cached_bytes=0)
        fill(ledger, new, 2)
        assert [(row.name, row.resident_bytes) for row in ledger.view().instances] == [
            ("stays", PAGE),
            ("new", 2 * PAGE),
        ]


def test_a_command_that_comes_late_steers_nobody_else(ledger: Ledger, path: Path) -> None:
    ledger.register(name="stays", engine="test")
    old = ledger.register(name="old", engine="test")
    with open_places(path.parent, ["old"]) as (places, _):
        ledger.unregister(old)
        new = ledger.register(name="new", engine="test")
        assert new.number == old.number
        with pytest.raises(LedgerError, match="has left"):
            control._change(places, [{"limit_bytes": PAGE}])
        assert places[0].now() is None
    assert [row.limit_bytes for row in ledger.view().instances] == [None, None]


def test_a_row_is_not_given_anew_while_a_late_process_of_it_lives(
    ledger: Ledger, path: Path
) -> None:
    with Ledger(path) as worker:
        ledger.register(name="stays", engine="test")
        old = ledger.register(name="old", engine="test")
        worker.join(old)
        ledger.unregister(old)
        assert ledger.register(name="new", engine="test").number != old.number
    assert ledger.register(name="newer", engine="test").number == old.number


def test_no_generation_is_used_twice_even_in_another_file(path: Path) -> None:
    seen = []
    for _ in range(5):
        with Ledger(path, GIB) as ledger:
            rows = [ledger.register(name=name, engine="test") for name in "ab"]
            seen += [row.generation for row in rows]
            for row in rows:
                ledger.unregister(row)
    assert seen == sorted(set(seen))


def test_who_opened_the_file_before_its_last_user_left_is_in_the_next_one(path: Path) -> None:
    with Ledger(path, GIB) as first, Ledger(path, GIB) as second:
        first.unregister(first.register(name="first", engine="test"))
        assert not path.exists()
        with Ledger(path, GIB) as third:
            rows = [
                each.register(name=each_name, engine="test")
                for each, each_name in ((second, "second"), (third, "third"))
            ]
            assert second.promise(rows[0], GIB, PAGE) + third.promise(rows[1], GIB, PAGE) == GIB


def test_who_opened_a_removed_file_makes_a_new_one_of_the_size_it_wanted(path: Path) -> None:
    with Ledger(path, GIB) as first, Ledger(path, GIB) as second, Ledger(path) as reader:
        first.unregister(first.register(name="first", engine="test"))
        assert reader.view().instances == ()
        assert not path.exists()
        second.register(name="second", engine="test")
        assert second.capacity_bytes == reader.view().capacity_bytes == GIB
        assert [row.name for row in reader.view().instances] == ["second"]


def test_who_only_looks_sees_the_next_file_when_the_last_user_has_left(path: Path) -> None:
    with Ledger(path, GIB) as first, Ledger(path) as reader:
        first.unregister(first.register(name="first", engine="test"))
        with Ledger(path, GIB) as second:
            second.register(name="second", engine="test")
            assert [row.name for row in reader.view().instances] == ["second"]


def test_a_late_process_of_a_removed_file_makes_no_new_one(path: Path) -> None:
    with Ledger(path, GIB) as owner, Ledger(path) as worker:
        row = owner.register(name="a", engine="test")
        worker.join(row)
        owner.unregister(row)
        for _ in range(2):
            with pytest.raises(LedgerError, match="cannot be opened: No such file"):
                worker.settle(row, used_bytes=0, cached_bytes=0)
        assert list(path.parent.iterdir()) == []
        with Ledger(path, GIB) as new:
            other = new.register(name="b", engine="test")
            with pytest.raises(LedgerError, match="has left"):
                worker.settle(row, used_bytes=0, cached_bytes=0)
            assert [seen.row for seen in new.view().instances] == [other]


def test_another_size_is_refused_in_the_new_file_too(path: Path) -> None:
    with Ledger(path, GIB) as first, Ledger(path, GIB) as second:
        first.unregister(first.register(name="first", engine="test"))
        with Ledger(path, 2 * GIB) as third:
            third.register(name="third", engine="test")
            with pytest.raises(LedgerError, match="wants a pool of 1 GiB"):
                second.register(name="second", engine="test")


def test_who_removed_a_file_and_died_before_it_was_gone_is_finished_for(path: Path) -> None:
    with Ledger(path, GIB) as old:
        old._header.magic = int.from_bytes(b"KVCGONE1", "little")
        with Ledger(path, 2 * GIB) as new:
            assert new.capacity_bytes == 2 * GIB
    assert list(path.parent.glob("*.damaged-*")) == []


def test_an_engine_whose_files_somebody_removed_goes_on_in_the_next_ones(path: Path) -> None:
    with Ledger(path, GIB) as old:
        row = old.register(name="old", engine="test")
        fill(old, row, 3)
        for file in path.parent.iterdir():
            file.unlink()
        old._look_around_ns = 0
        old.promise(row, 0, PAGE)
        with Ledger(path, GIB) as new:
            other = new.register(name="new", engine="test")
            assert new.promise(other, GIB, PAGE) == GIB - 3 * PAGE
            new._enter_patiently()  # looks who lives
            new._exit()
            assert {seen.name for seen in new.view().instances} == {"old", "new"}


@pytest.mark.parametrize("number", [0, 1])
def test_nobody_is_taken_for_dead_when_the_file_of_their_locks_was_removed(
    path: Path, number: int
) -> None:
    with Ledger(path, GIB) as old:
        rows = [old.register(name=name, engine="test") for name in ("x", "y")]
        old.unregister(rows[1 - number])
        fill(old, rows[number], 3)
        path.with_suffix(".alive").unlink()
        with Ledger(path) as reader:
            assert [seen.row.number for seen in reader.view().instances] == [number]
        with Ledger(path, GIB) as new:
            other = new.register(name="new", engine="test")
            if number == other.number:
                with pytest.raises(LedgerError, match="'new' has its row now"):
                    old.cancel(rows[number], 0)
                return
            old.cancel(rows[number], 0)
            assert new.promise(other, GIB, PAGE) == GIB - 3 * PAGE
            assert len(new.view().instances) == 2
        assert len(list(path.parent.glob("*.damaged-*"))) == 1


@pytest.mark.parametrize("is_worker_first", [True, False])
def test_of_two_processes_with_one_row_the_newer_copy_is_written_into_a_new_file(
    ledger: Ledger, path: Path, *, is_worker_first: bool
) -> None:
    with Ledger(path) as worker:
        row = ledger.register(name="a", engine="test")
        worker.join(row)
        assert ledger.promise(row, 3 * PAGE, PAGE) == 3 * PAGE
        damage(path)
        with Ledger(path, GIB):
            for each in (worker, ledger) if is_worker_first else (ledger, worker):
                each._enter_patiently()
                each._exit()
        (seen,) = ledger.view().instances
        assert seen.promised_bytes == 3 * PAGE


@pytest.mark.parametrize("is_worker_first", [True, False])
def test_weights_that_only_a_worker_knows_are_in_the_new_file_too(
    ledger: Ledger, path: Path, *, is_worker_first: bool
) -> None:
    with Ledger(path) as worker:
        row = ledger.register(name="a", engine="test")
        worker.join(row)
        ledger.describe_weights(row, 20 * PAGE)
        worker.settle_weights(row, mapped_bytes=20 * PAGE)
        ledger.offer_weights(row, 20 * PAGE)
        fill(ledger, row, 3)
        worker.settle_weights(row, unmapped_bytes=8 * PAGE)
        damage(path)
        with Ledger(path, GIB):
            for each in (worker, ledger) if is_worker_first else (ledger, worker):
                each._enter_patiently()
                each._exit()
        (seen,) = ledger.view().instances
        assert (seen.resident_bytes, seen.used_bytes) == (15 * PAGE, 3 * PAGE)
        assert (seen.weights_bytes, seen.weights_offered_bytes) == (12 * PAGE, 12 * PAGE)
        assert ledger.room_bytes(row) == GIB - 15 * PAGE


@pytest.mark.parametrize("num_later", [0, 4])
def test_weights_that_moved_while_another_process_had_not_repaired_are_counted_once(
    ledger: Ledger, path: Path, *, num_later: int
) -> None:
    with Ledger(path) as worker:
        row = ledger.register(name="a", engine="test")
        worker.join(row)
        ledger.describe_weights(row, 20 * PAGE)
        fill(ledger, row, 3)
        worker.settle_weights(row, mapped_bytes=20 * PAGE)
        worker.settle_weights(row, unmapped_bytes=4 * PAGE)
        damage(path)
        with Ledger(path, GIB):
            for _ in range(num_later):  # in the new file, from what it knew
                ledger.settle(row, used_bytes=2 * PAGE, cached_bytes=PAGE)
            worker._enter_patiently()
            worker._exit()
        (seen,) = ledger.view().instances
        assert (seen.resident_bytes, seen.weights_bytes) == (19 * PAGE, 16 * PAGE)
        assert seen.idle_bytes == 0


def test_a_process_that_only_joined_repairs_its_row_and_keeps_it_alive(
    ledger: Ledger, path: Path
) -> None:
    with Ledger(path) as worker:
        row = ledger.register(name="a", engine="test")
        worker.join(row)
        damage(path)
        with Ledger(path, GIB) as new:
            worker._enter_patiently()
            worker._exit()
            ledger.close()
            assert not new.remove_if_unused()
            assert [seen.row for seen in new.view().instances] == [row]


def test_a_row_lives_as_long_as_any_of_many_ranks(path: Path) -> None:
    with Ledger(path, GIB) as ledger, Ledger(path, GIB) as other:
        row = ledger.register(name="a", engine="test")
        ranks = [Ledger(path) for _ in range(16)]
        for rank in ranks:
            rank.join(row)
        ledger.close()
        for rank in ranks:
            assert not other.remove_if_unused()
            assert [seen.name for seen in other.view().instances] == ["a"]
            rank.close()
        assert other.view().instances == ()
        assert other.remove_if_unused()


def test_a_process_does_not_join_a_row_that_was_reaped_meanwhile(
    ledger: Ledger, path: Path
) -> None:
    with Ledger(path, GIB) as owner:
        row = owner.register(name="a", engine="test")
    ledger.register(name="b", engine="test")
    with Ledger(path) as worker, pytest.raises(LedgerError, match="was taken for dead"):
        worker.join(row)


NEIGHBOUR = """
import sys
from pathlib import Path
from kvcached_core.ledger.ledger import Ledger
with Ledger(Path(sys.argv[1]), 1 << 30) as ledger:
    row = ledger.register(name="elsewhere", engine="test")
    print(ledger.promise(row, 1 << 29, 1 << 24), flush=True)
    for line in sys.stdin:
        ledger._enter_patiently()
        ledger._exit()
        print(",".join(sorted(row.name for row in ledger.view().instances)), flush=True)
"""


def test_two_pid_namespaces_share_a_ledger_and_nobody_is_taken_for_dead(
    ledger: Ledger, path: Path
) -> None:
    """Needs root, for a PID namespace."""
    row = ledger.register(name="here", engine="test")
    elsewhere = subprocess.Popen(
        ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", NEIGHBOUR, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert elsewhere.stdin is not None
    assert elsewhere.stdout is not None
    assert elsewhere.stdout.readline() == f"{1 << 29}\n", "unshare needs root"
    for _ in range(3):
        ledger._enter_patiently()  # looks who lives
        ledger._exit()
        assert {seen.name for seen in ledger.view().instances} == {"here", "elsewhere"}
        elsewhere.stdin.write("\n")
        elsewhere.stdin.flush()
        assert elsewhere.stdout.readline() == "elsewhere,here\n"
    (found,) = (each for each in examine(path.parent) if each.what == "host.ledger")
    assert found.is_good
    assert "shared by here, elsewhere (in another PID namespace)" in found.text
    assert ledger.promise(row, GIB, PAGE) == GIB - (1 << 29)
    elsewhere.communicate()
    assert [seen.name for seen in ledger.view().instances] == ["here"]


def test_sweeping_leaves_what_is_in_use_and_removes_what_is_not(path: Path) -> None:
    with Ledger(path, GIB) as ledger:
        row = ledger.register(name="a", engine="test")
        orphan = path.with_name("other.alive")
        orphan.touch()
        sweep(path.parent)
        assert not orphan.exists()
        assert path.exists()
        ledger.cancel(row, 0)
    sweep(path.parent)
    assert list(path.parent.iterdir()) == []


OLD_BYTES = MAGIC.to_bytes(8, "little") + (3).to_bytes(8, "little") + bytes(33280 - 16)


@pytest.mark.parametrize("content", [OLD_BYTES, OLD_BYTES + bytes(65536), OLD_BYTES[:4096]])
def test_a_ledger_of_another_version_is_left_to_the_engines_that_have_it_open(
    path: Path, content: bytes
) -> None:
    path.write_bytes(content)
    with path.open("rb") as older_engine:
        for capacity_bytes in (None, GIB):
            with pytest.raises(
                LedgerError, match=r"version 3, this .* version 4: .*set KVCACHED_DIR"
            ):
                Ledger(path, capacity_bytes)
        sweep(path.parent)
        assert os.path.samestat(os.fstat(older_engine.fileno()), path.stat())
        assert older_engine.read() == content
    assert [file.name for file in path.parent.iterdir()] == ["host.ledger"]


def test_an_older_kvcached_sees_another_version_and_not_a_damaged_file(ledger: Ledger) -> None:
    content = ledger.path.read_bytes()
    assert len(content) == len(OLD_BYTES)  # it looks at the length before the version
    assert content[:8] == OLD_BYTES[:8]
    assert int.from_bytes(content[8:16], "little") == 4
