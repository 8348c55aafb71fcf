"""vLLM's host tier takes room in the host budget, and says what it did."""

import mmap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
from helpers.configurations import configuration
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import (
    OffloadingConnectorStats,
)
from vllm.v1.kv_offload.tiering.base import TieringOffloadingMetrics

from kvcached_core.config import Config, read_config
from kvcached_core.errors import HostBudgetError
from kvcached_core.units import MIB
from kvcached_core.weights.host_budget import HostBudget
from kvcached_core.weights.host_tier import TierCounts, read_tiers
from kvcached_vllm.host_tier import (
    CountedTier,
    disk_counts,
    disk_folders,
    region_of,
    tier_bytes,
)

pytestmark = pytest.mark.vllm


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def config(tmp_path: Path) -> Config:
    settings = {"KVCACHED_DIR": str(tmp_path / "kv"), "KVCACHED_HOST_BUDGET": str(64 * MIB)}
    return read_config(settings)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def tier(config: Config, clock: Clock) -> Iterator[CountedTier]:
    made = CountedTier(config, "chat", 48 * MIB, clock)
    yield made
    made.close()


def seen(config: Config) -> Any:
    (view,) = read_tiers(HostBudget(config).folder)
    return view


def transfers(store: tuple[int, float], load: tuple[int, float] = (0, 0.0)) -> Any:
    return SimpleNamespace(
        store=SimpleNamespace(bytes=store[0], time=store[1]),
        load=SimpleNamespace(bytes=load[0], time=load[1]),
    )


def test_a_tier_that_the_budget_has_no_room_for_is_refused_with_who_has_it(
    config: Config, tier: CountedTier
) -> None:
    assert seen(config).reserved_bytes == 48 * MIB
    who = "the offloaded cache of chat 48 MiB is in use; lower --kv-offloading-size"
    with pytest.raises(HostBudgetError, match=f"the offloaded cache of code needs .* {who}"):
        CountedTier(config, "code", 32 * MIB)
    tier.close()
    CountedTier(config, "code", 32 * MIB).close()


def test_a_tier_grows_as_far_as_there_is_room(config: Config, tier: CountedTier) -> None:
    tier.grow(8 * MIB)
    assert (seen(config).reserved_bytes, tier.num_bytes) == (56 * MIB, 56 * MIB)
    with pytest.raises(HostBudgetError, match="the offloaded cache of chat needs 72 MiB"):
        tier.grow(16 * MIB)
    tier.close()


def test_counts_add_up_and_are_told_now_and_then(
    config: Config, tier: CountedTier, clock: Clock
) -> None:
    tier.hit(64)
    tier.copied(transfers((MIB, 0.5), (2 * MIB, 0.25)), is_last=False)
    tier.copied(transfers((MIB, 0.5)), is_last=False)
    first = TierCounts("host", MIB, MIB, 2 * MIB, 1, 64, 0.5, 0.25)
    assert seen(config).counts == (first,)
    clock.now += 1
    tier.copied(transfers((MIB, 0.5)), is_last=False)
    assert seen(config).counts[0].stored_bytes == 3 * MIB


def test_the_last_copy_is_told_at_once(config: Config, tier: CountedTier) -> None:
    tier.copied(transfers((MIB, 0.5)), is_last=False)
    tier.copied(transfers((MIB, 0.5)), is_last=True)
    assert seen(config).counts[0].stored_bytes == 2 * MIB


def test_a_tier_holds_no_more_than_its_size_and_nothing_after_a_reset(
    config: Config, tier: CountedTier
) -> None:
    tier.copied(transfers((100 * MIB, 0.5)), is_last=True)
    assert seen(config).counts[0].held_bytes == 48 * MIB
    tier.reset()
    assert seen(config).counts[0].held_bytes == 0
    assert seen(config).counts[0].stored_bytes == 100 * MIB


def test_its_size_is_what_the_connector_is_told() -> None:
    extra: dict[str, Any] = {"cpu_bytes_to_use": 1.5 * MIB}
    transfer = SimpleNamespace(kv_connector_extra_config=extra)
    assert tier_bytes(configuration(kv_transfer_config=transfer)) == 3 * MIB // 2
    extra.clear()
    assert tier_bytes(configuration(kv_transfer_config=transfer)) == 0


def test_a_tier_on_disk_is_said_with_how_fast_prompts_are_computed(
    config: Config, clock: Clock
) -> None:
    tier = CountedTier(config, "disks", MIB, clock, ["/nvme/kv"])
    tier.token_bytes = 1000.0

    def speed() -> Any:
        tier.copied(transfers((MIB, 0.5)), is_last=True)
        ((disk,),) = (view.disks for view in read_tiers(HostBudget(config).folder))
        assert disk.folder == "/nvme/kv"
        return disk.computed_bytes_per_second

    assert speed() == 0
    for _ in range(2):
        clock.now += 0.1
        tier.computed(2000)
    assert speed() == pytest.approx(20_000_000)
    tier.close()


def test_without_one_nothing_is_said_of_disks(config: Config, tier: CountedTier) -> None:
    tier.computed(100_000)
    tier.copied(transfers((MIB, 0.5)), is_last=True)
    assert seen(config).disks == ()


def test_tiers_on_disk_are_those_that_have_a_folder() -> None:
    extra: dict[str, Any] = {"secondary_tiers": [{"type": "fs", "root_dir": "/a"}, {"type": "x"}]}
    transfer = SimpleNamespace(kv_connector_extra_config=extra)
    assert disk_folders(configuration(kv_transfer_config=transfer)) == ["/a"]
    extra.clear()
    assert disk_folders(configuration(kv_transfer_config=transfer)) == []


def test_its_region_is_the_file_that_this_release_makes() -> None:
    from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion

    engine_id = f"test-{uuid4()}"
    region = SharedOffloadRegion(engine_id, 1, None, mmap.PAGESIZE, mmap.PAGESIZE)
    try:
        transfer = SimpleNamespace(engine_id=engine_id)
        assert region.mmap_path == region_of(configuration(kv_transfer_config=transfer))
        assert Path(region.mmap_path).stat().st_size == mmap.PAGESIZE
    finally:
        region.cleanup()


@pytest.mark.older_release
def test_what_vllm_counts_of_disks_is_theirs_and_adds_up(config: Config, tier: CountedTier) -> None:
    names = TieringOffloadingMetrics
    stats = OffloadingConnectorStats()
    for name, value in ((names.READ_BYTES, MIB), (names.WRITE_BYTES, 3 * MIB)):
        stats.increase_counter(name, value, ("1:fs",))
        stats.increase_counter(name, value, ("2:fs",))
    stats.increase_counter(names.READ_TIME, 0.5, ("1:fs",))
    stats.increase_counter(names.WRITE_TIME, 0.25, ("1:fs",))
    chunk_hits = getattr(names, "CHUNK_HITS", None) or names.BLOCK_HITS  # 0.28's word
    stats.increase_counter(chunk_hits, 7, ("0:cpu",))
    stats.increase_counter(chunk_hits, 2, ("1:fs",))
    found = disk_counts(stats.data)
    assert found == TierCounts("disk", 0, 6 * MIB, 2 * MIB, 0, 0, 0.25, 0.5, 2)
    tier.token_bytes = MIB / 16
    tier.moved(found)
    tier.moved(found)
    tier.tell(is_last=True)
    both = TierCounts("disk", 0, 12 * MIB, 4 * MIB, 0, 64, 0.5, 1.0, 4)
    assert seen(config).counts == (TierCounts("host"), both)


def test_statistics_that_say_nothing_of_disks_are_none() -> None:
    stats = OffloadingConnectorStats()
    assert disk_counts(stats.data) is None
    stats.increase_counter("vllm:kv_offload_load_bytes", MIB)
    stats.increase_counter("vllm:kv_offload_tiering_chunk_hits", 7, ("0:cpu",))
    assert disk_counts(stats.data) is None
