"""What benchmarks say of a server's host tier is what its engine told."""

from pathlib import Path

from parts.tier_counts import host_counts

from kvcached_core.config import read_config
from kvcached_core.units import MIB
from kvcached_core.weights.counted_tier import CountedTier
from kvcached_core.weights.host_tier import DISK, TierCounts


def test_each_server_has_the_counts_of_its_host_tier_once_it_told_them(tmp_path: Path) -> None:
    config = read_config({"KVCACHED_DIR": str(tmp_path), "KVCACHED_HOST_BUDGET": str(64 * MIB)})
    tiers = [CountedTier(config, name, 16 * MIB, setting="--size") for name in ("m0", "m1")]
    assert host_counts(tmp_path) == {}
    tiers[0].loaded(3 * MIB, 0.5)
    tiers[0].moved(TierCounts(DISK, loaded_bytes=MIB))
    tiers[0].tell(is_last=True)
    assert {name: one.loaded_bytes for name, one in host_counts(tmp_path).items()} == {
        "m0": 3 * MIB
    }
    tiers[1].stored(2 * MIB, 0.5)
    tiers[1].tell(is_last=True)
    found = host_counts(tmp_path)
    assert (found["m1"].stored_bytes, found["m1"].loaded_bytes) == (2 * MIB, 0)
    for tier in tiers:
        tier.close()
    assert host_counts(tmp_path) == {}
