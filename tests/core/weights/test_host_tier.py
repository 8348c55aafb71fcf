"""Host memory of offloaded caches in the one budget, and what engines say of their tiers."""

import errno
import json
import os
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
from helpers.forked import exit_code_of_child

from kvcached_core.config import Config
from kvcached_core.engine import starting
from kvcached_core.engine.instance import Instance
from kvcached_core.errors import HostBudgetError
from kvcached_core.memory.devices import host_device
from kvcached_core.units import GIB, MIB
from kvcached_core.weights import host_tier
from kvcached_core.weights.copies_folder import read_holders, remove_leftovers
from kvcached_core.weights.host_budget import HostBudget
from kvcached_core.weights.host_tier import DISK, HOST, HostTier, TierCounts, TierView, read_tiers

SETTING = "--kv-offloading-size"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(dir=tmp_path, host_budget=10 * GIB)


def reserve(config: Config, name: str, num_bytes: int) -> HostTier:
    return HostTier.reserve(config, name, num_bytes, setting=SETTING)


def test_a_tier_and_copies_of_weights_share_one_budget(config: Config) -> None:
    weights = HostBudget(config).claim("llama", 6 * GIB)
    tier = reserve(config, "qwen", 4 * GIB)
    with pytest.raises(HostBudgetError, match="llama 6 GiB"):
        HostBudget(config).claim("gemma", 1)
    tier.close()
    tier.close()
    HostBudget(config).claim("gemma", 4 * GIB)
    weights.close()


def test_a_start_without_room_says_who_has_how_much_and_what_to_set(config: Config) -> None:
    first = reserve(config, "llama", 7 * GIB)
    with pytest.raises(HostBudgetError) as caught:
        reserve(config, "qwen", 4 * GIB)
    assert str(caught.value) == (
        "the offloaded cache of qwen needs 4 GiB of host memory; of the KVCACHED_HOST_BUDGET of "
        "10 GiB the offloaded cache of llama 7 GiB is in use; lower --kv-offloading-size, raise "
        "KVCACHED_HOST_BUDGET, or stop who has it"
    )
    assert (caught.value.needed_bytes, caught.value.budget_bytes) == (4 * GIB, 10 * GIB)
    first.close()


def start_on_host(config: Config, usable_bytes: int) -> Instance:
    """Start an engine on the host, as if its process may use so much."""
    with patch.object(starting, "host_memory", lambda: Mock(usable_bytes=usable_bytes)):
        return Instance([host_device(config)], config, default_name="cpu", engine="test")


def test_the_pool_of_engines_on_the_host_is_counted_beside_copies_and_tiers(
    config: Config,
) -> None:
    config = config.model_copy(update={"host_pool": 12 * GIB})
    budget = HostBudget(config, usable_bytes=16 * GIB)
    engine = start_on_host(config, 16 * GIB)
    weights = budget.claim("llama", 3 * GIB)
    with pytest.raises(HostBudgetError) as caught:
        budget.claim("the offloaded cache of qwen", 2 * GIB)
    assert str(caught.value) == (
        "the offloaded cache of qwen needs 2 GiB of host memory; of the KVCACHED_HOST_BUDGET of "
        "10 GiB llama 3 GiB is in use; KVCACHED_HOST_POOL leaves 4 GiB of it, of 16 GiB that may "
        "be used"
    )
    assert caught.value.budget_bytes == 4 * GIB
    engine.close()
    budget.claim("qwen", 7 * GIB).close()
    weights.close()


def test_a_first_engine_on_the_host_needs_room_for_its_pool_beside_what_is_in_use(
    config: Config,
) -> None:
    config = config.model_copy(update={"host_pool": 12 * GIB})
    budget = HostBudget(config, usable_bytes=32 * GIB)
    tier = budget.claim("the offloaded cache of qwen", 5 * GIB)
    with pytest.raises(HostBudgetError) as caught:
        start_on_host(config, 16 * GIB)
    assert str(caught.value) == (
        "KVCACHED_HOST_POOL=12 GiB is more than is left of the 16 GiB of host memory that may be "
        "used: the offloaded cache of qwen 5 GiB is in use; lower KVCACHED_HOST_POOL, or stop who "
        "has it"
    )
    tier.close()
    first = start_on_host(config, 16 * GIB)
    tier = budget.claim("the offloaded cache of qwen", 5 * GIB)  # of a process that may use more
    start_on_host(config, 16 * GIB).close()  # the pool is there already
    tier.close()
    first.close()


def test_a_tier_ends_with_its_process_and_a_forked_child_ends_none(config: Config) -> None:
    mine = reserve(config, "mine", GIB)

    def die_with_one() -> None:
        reserve(config, "killed", 9 * GIB)
        os._exit(7)

    assert exit_code_of_child(die_with_one) == 7
    assert [view.instance for view in read_tiers(config.copies_dir)] == ["mine"]
    reserve(config, "next", 9 * GIB).close()
    assert exit_code_of_child(mine.close) == 0
    assert [view.instance for view in read_tiers(config.copies_dir)] == ["mine"]


def killed_with(config: Config, region: Path, num_bytes: int = MIB) -> None:
    """Have a process reserve a tier in a file, fill that, and end without closing anything."""

    def die() -> None:
        HostTier.reserve(config, "killed", num_bytes, setting=SETTING, region=str(region))
        region.write_bytes(bytes(num_bytes))
        os._exit(7)

    assert exit_code_of_child(die) == 7


def test_host_memory_that_a_killed_engine_left_is_seen_and_goes_with_the_next_claim(
    config: Config, tmp_path: Path
) -> None:
    left, own = tmp_path / "left.mmap", tmp_path / "own.mmap"
    mine = HostTier.reserve(config, "mine", MIB, setting=SETTING, region=str(own))
    own.write_bytes(bytes(MIB))
    killed_with(config, left)
    (seen,) = (one for one in read_holders(config.copies_dir) if not one.is_used)
    assert (seen.name, seen.num_bytes) == (f"{left}, left by the offloaded cache of killed", MIB)
    assert [view.instance for view in read_tiers(config.copies_dir)] == ["mine"]
    reserve(config, "next", MIB).close()
    assert not left.exists()
    assert own.exists()
    mine.close()
    reserve(config, "next", MIB).close()
    assert own.exists()  # its maker ended well, and removes it or not


def test_what_is_not_a_file_of_this_user_is_no_leftover(config: Config, tmp_path: Path) -> None:
    other, link, folder = tmp_path / "other", tmp_path / "link", tmp_path / "folder"
    other.write_bytes(bytes(MIB))
    link.symlink_to(other)
    folder.mkdir()
    for region in (link, folder, tmp_path / "gone", Path("relative"), Path()):
        HostTier.reserve(config, "x", MIB, setting=SETTING, region=str(region))._claim.disown()
    assert read_holders(config.copies_dir) == []
    remove_leftovers(config.copies_dir)
    assert other.exists()
    assert link.is_symlink()
    assert folder.is_dir()


def test_what_an_engine_says_of_its_tiers_is_seen_as_it_said_it_last(config: Config) -> None:
    tier = reserve(config, "llama", GIB)
    weights = HostBudget(config).claim("llama", GIB)
    assert read_tiers(config.copies_dir) == [TierView("llama", GIB)]
    first = TierCounts(HOST, 300 * MIB, 10**12, 10**11, 1000, 10**9, 123.5, 0.25)
    tier.note([first, TierCounts(DISK, stored_bytes=5)])
    (view,) = read_tiers(config.copies_dir)
    assert view.counts == (first, TierCounts(DISK, stored_bytes=5))
    assert view.held_bytes == 300 * MIB
    tier.note([TierCounts(HOST)])  # a shorter text in the same place
    assert read_tiers(config.copies_dir) == [TierView("llama", GIB, (TierCounts(HOST),))]
    weights.close()
    tier.close()
    assert read_tiers(config.copies_dir) == []


def test_counts_that_are_being_written_are_left_out_and_the_room_is_not(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = reserve(config, "llama", GIB)
    tier.note([TierCounts(HOST, 1)])
    whole, reads = host_tier.read_note, []

    def torn(path: Path) -> str:
        reads.append(path)
        return whole(path).replace("1,", "2,", 1) if len(reads) % 2 else whole(path)

    monkeypatch.setattr(host_tier, "read_note", torn)
    assert read_tiers(config.copies_dir)[0].counts == (TierCounts(HOST, 1),)
    monkeypatch.setattr(host_tier, "read_note", lambda path: whole(path)[:-5])
    assert read_tiers(config.copies_dir) == [TierView("llama", GIB)]


def test_counts_that_cannot_be_written_end_nothing(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_fd: int, _line: str) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    tier = reserve(config, "qwen", GIB)
    before = read_tiers(config.copies_dir)
    with monkeypatch.context() as patches:
        patches.setattr(host_tier, "note_in", fail)
        tier.note([TierCounts(HOST, 1)])
    assert read_tiers(config.copies_dir) == before
    tier.close()
    tier.note([TierCounts(HOST, 1)])


def test_counts_of_a_later_version_are_read_as_far_as_they_are_known(config: Config) -> None:
    tier = reserve(config, "llama", GIB)
    text = json.dumps([{"tier": HOST, "held_bytes": 3, "num_new": 9}])
    host_tier.note_in(tier._claim.fd, f"{host_tier.crc32(text.encode())} {text}\n")
    assert read_tiers(config.copies_dir)[0].counts == (TierCounts(HOST, 3),)


def test_a_folder_that_is_not_there_has_no_tiers(tmp_path: Path) -> None:
    assert read_tiers(tmp_path / "none") == []
