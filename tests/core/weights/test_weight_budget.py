"""The host budget: what is held is counted once, goes with its process, and gives way if unused."""

import os
import signal
from pathlib import Path
from threading import Event

import pytest
from helpers.forked import exit_code_of_child

from kvcached_core.config import Config
from kvcached_core.errors import HostBudgetError, HostCopyError, KVCachedError
from kvcached_core.ledger.lock import FileLock
from kvcached_core.ledger.opening import ledger_directory
from kvcached_core.units import GIB, KIB, MIB
from kvcached_core.weights import folder_lock
from kvcached_core.weights.copies_folder import copies_folder, read_holders
from kvcached_core.weights.host_budget import HostBudget
from kvcached_core.weights.host_file import SharedFile, open_shared
from kvcached_core.weights.key import CopyKey
from kvcached_core.weights.record import Shape

BUDGET = 10 * MIB


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(weights_dir=tmp_path / "weights", host_budget=BUDGET)


@pytest.fixture
def budget(config: Config) -> HostBudget:
    return HostBudget(config, GIB)


def held(budget: HostBudget) -> dict[str, int]:
    return {holder.name: holder.num_bytes for holder in read_holders(budget.folder)}


def finished(budget: HostBudget, name: str, num_bytes: int) -> SharedFile:
    """Return a finished image of a size, in use."""
    shape = Shape(CopyKey(name, name), num_bytes, 1)
    file = open_shared(budget.folder, shape, Event())
    assert file is not None
    file.allocate()
    file.publish([(1, 2)], [3])
    return file


def test_a_share_is_one_of_what_the_process_may_use(tmp_path: Path) -> None:
    assert HostBudget(Config(weights_dir=tmp_path, host_budget="25%"), GIB).budget_bytes == GIB // 4


def test_claims_add_up_to_the_budget_and_no_further(budget: HostBudget) -> None:
    first = budget.claim("llama", 6 * MIB)
    budget.claim("qwen", 4 * MIB)
    with pytest.raises(HostBudgetError) as caught:
        budget.claim("gemma", 1)
    text = str(caught.value)
    assert "gemma needs 1 B" in text
    assert "KVCACHED_HOST_BUDGET of 10 MiB" in text
    assert "llama 6 MiB" in text
    assert "qwen 4 MiB" in text
    assert (caught.value.needed_bytes, caught.value.budget_bytes) == (1, BUDGET)
    first.close()
    assert budget.claim("gemma", 6 * MIB).num_bytes == 6 * MIB


def test_an_error_of_the_budget_is_ours_and_one_of_memory() -> None:
    assert issubclass(HostBudgetError, KVCachedError)
    assert issubclass(HostBudgetError, MemoryError)


def test_a_claim_is_given_back_once(budget: HostBudget) -> None:
    claim = budget.claim("llama", MIB)
    claim.close()
    claim.close()
    assert held(budget) == {}
    assert list(budget.folder.glob("*.claim")) == []


def test_all_processes_share_the_budget(budget: HostBudget, config: Config) -> None:
    def claim_too_much() -> None:
        with pytest.raises(HostBudgetError, match="llama 6 MiB"):
            HostBudget(config, GIB).claim("qwen", 5 * MIB)

    budget.claim("llama", 6 * MIB)
    assert exit_code_of_child(claim_too_much) == 0


def test_nothing_stays_claimed_by_a_process_that_was_killed(budget: HostBudget) -> None:
    def claim_and_die() -> None:
        budget.claim("llama", BUDGET)
        os.kill(os.getpid(), signal.SIGKILL)

    assert exit_code_of_child(claim_and_die) == -signal.SIGKILL
    assert held(budget) == {}
    budget.claim("qwen", BUDGET)
    assert held(budget) == {"qwen": BUDGET}
    assert len(list(budget.folder.glob("*.claim"))) == 1


def test_a_forked_child_keeps_nothing_claimed_and_gives_nothing_back(budget: HostBudget) -> None:
    claim = budget.claim("llama", BUDGET)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(writing)
        claim.close()
        os.read(reading, 1)
        os._exit(0)
    try:
        assert held(budget) == {"llama": BUDGET}
        claim.close()
        assert held(budget) == {}
        budget.claim("qwen", BUDGET)
    finally:
        os.close(writing)
        os.close(reading)
        os.waitpid(pid, 0)


def test_a_copy_that_is_filled_counts_once(budget: HostBudget) -> None:
    shape = Shape(CopyKey("k", "llama"), 6 * MIB, 1)
    file = open_shared(budget.folder, shape, Event())
    assert file is not None
    claim = budget.claim("llama", 6 * MIB, file=file.path.name)
    file.allocate()
    assert held(budget) == {"llama": 6 * MIB}
    file.publish([(1, 2)], [3])
    claim.close()
    assert held(budget) == {"llama": 6 * MIB}


def test_a_copy_in_use_is_not_removed(budget: HostBudget) -> None:
    file = finished(budget, "llama", 6 * MIB)
    with pytest.raises(HostBudgetError, match="llama 6 MiB is in use"):
        budget.claim("qwen", 5 * MIB)
    assert file.path.exists()


def test_unused_copies_give_way_oldest_first_and_no_more_than_needed(budget: HostBudget) -> None:
    for name in ("old", "older", "oldest"):
        finished(budget, name, 3 * MIB).close()
    for age, name in enumerate(("old", "older", "oldest")):
        os.utime(budget.folder / f"{name}.json", ns=(10**9 - age, 10**9 - age))
    budget.claim("qwen", 4 * MIB)
    assert held(budget) == {"old": 3 * MIB, "older": 3 * MIB, "qwen": 4 * MIB}
    assert not list(budget.folder.glob("oldest*"))


def test_of_unused_copies_of_one_tick_of_the_clock_the_first_by_name_goes(
    budget: HostBudget,
) -> None:
    for name in ("b", "c", "a"):
        finished(budget, name, 3 * MIB).close()
        os.utime(budget.folder / f"{name}.json", ns=(1, 1))
    for number, left in enumerate([{"b", "c"}, {"c"}]):
        budget.claim(f"claim-{number}", 3 * MIB)
        assert {name for name in held(budget) if not name.startswith("claim")} == left


def test_a_claim_that_never_fits_removes_nothing(budget: HostBudget) -> None:
    finished(budget, "old", 3 * MIB).close()
    budget.claim("llama", 6 * MIB)
    with pytest.raises(HostBudgetError, match="llama 6 MiB is in use"):
        budget.claim("qwen", 5 * MIB)
    assert held(budget) == {"old": 3 * MIB, "llama": 6 * MIB}


def test_using_a_copy_makes_it_the_youngest(budget: HostBudget) -> None:
    for name in ("one", "two"):
        finished(budget, name, 4 * MIB).close()
        os.utime(budget.folder / f"{name}.json", ns=(1, 1))
    finished_again = open_shared(budget.folder, Shape(CopyKey("one", "one"), 4 * MIB, 1), Event())
    assert finished_again is not None
    assert finished_again.sums == [(1, 2)]
    finished_again.close()
    budget.claim("qwen", 6 * MIB)
    assert set(held(budget)) == {"one", "qwen"}


def test_what_nobody_finishes_is_removed_with_the_next_claim(budget: HostBudget) -> None:
    def fill_and_die() -> None:
        file = open_shared(budget.folder, Shape(CopyKey("k", "llama"), MIB, 1), Event())
        assert file is not None
        file.allocate()
        os.kill(os.getpid(), signal.SIGKILL)

    assert exit_code_of_child(fill_and_die) == -signal.SIGKILL
    assert (budget.folder / "k.image").stat().st_size == MIB
    (budget.folder / "gone.json").write_text("{}")
    (budget.folder / "gone.new").write_text("{}")
    budget.claim("qwen", BUDGET)
    assert sorted(path.suffix for path in budget.folder.iterdir()) == [".claim", ".lock"]


@pytest.mark.parametrize("text", [b"", b"nonsense", b"[]", b'{"name": "x"}'])
def test_a_claim_that_cannot_be_read_counts_nothing(budget: HostBudget, text: bytes) -> None:
    budget.claim("llama", MIB)
    (budget.folder / "1-1.claim").write_bytes(text)
    assert held(budget) == {"llama": MIB}
    budget.claim("qwen", MIB)
    assert not (budget.folder / "1-1.claim").exists()


def test_a_folder_without_room_for_a_claim_is_no_room(
    budget: HostBudget, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget.claim("llama", MIB)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(HostBudgetError, match="no room to claim 1 KiB for qwen: No space left"):
        budget.claim("qwen", KIB)
    assert held(budget) == {"llama": MIB}


def test_who_does_not_go_on_with_the_lock_is_said(
    budget: HostBudget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_lock, "LOCK_SECONDS", 0.0)
    with (
        budget._room_for("llama", 0),
        pytest.raises(HostCopyError, match=r"budget\.lock is locked by another process"),
    ):
        budget.claim("qwen", KIB)
    budget.claim("qwen", KIB)


def test_a_lock_that_was_removed_is_not_believed(
    budget: HostBudget, monkeypatch: pytest.MonkeyPatch
) -> None:
    acquire, path = FileLock.acquire, budget.folder / "budget.lock"
    removals = [path.unlink]

    def lose_once(lock: FileLock, seconds: float) -> bool:
        if removals:
            removals.pop()()
        return acquire(lock, seconds)

    monkeypatch.setattr(FileLock, "acquire", lose_once)
    with budget._room_for("llama", 0):
        assert path.exists()


def test_a_lock_that_cannot_be_opened_is_said(budget: HostBudget) -> None:
    copies_folder(budget.folder)
    (budget.folder / "budget.lock").mkdir()
    with pytest.raises(HostCopyError, match=r"budget\.lock cannot be opened: Is a directory"):
        budget.claim("qwen", KIB)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "weights"


def test_the_folder_is_made_for_this_user_alone(folder: Path) -> None:
    assert copies_folder(folder / "a").stat().st_mode & 0o777 == 0o700
    assert ledger_directory(folder) == folder  # ledgers may lie above it


def test_a_folder_that_others_may_look_into_is_refused(folder: Path) -> None:
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)
    with pytest.raises(HostCopyError, match=r"open to other users \(mode 0755\); allowed is 0700"):
        copies_folder(folder)


def test_a_folder_of_another_user_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(HostCopyError, match="is not a folder of this user"):
        copies_folder(folder)


def test_a_folder_that_cannot_be_made_is_refused(folder: Path) -> None:
    folder.touch()
    with pytest.raises(HostCopyError, match="cannot be made: Not a directory"):
        copies_folder(folder / "a")
    with pytest.raises(HostCopyError, match="cannot be made: File exists"):
        copies_folder(folder)
