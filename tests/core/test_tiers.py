"""What `list`, `top` and the metrics say of caches that engines have offloaded."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.commands import said
from prometheus_client.parser import text_string_to_metric_families

from kvcached_core.cli.added import Added
from kvcached_core.cli.metrics import exposition
from kvcached_core.cli.tiers import tiers, with_tiers
from kvcached_core.config import Config
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.opening import ledger_directory
from kvcached_core.units import GIB, MIB
from kvcached_core.weights.host_tier import DISK, HOST, HostTier, TierCounts, TierView


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with two engines, of which one has a tier."""
    directory = ledger_directory(tmp_path / "kv")
    monkeypatch.setenv("KVCACHED_DIR", str(directory))
    with Ledger(directory / "host.ledger", GIB) as ledger:
        for name in ("llama", "qwen"):
            ledger.register(name=name, engine="vllm 0.32.0")
        config = Config(dir=directory, host_budget=10 * GIB)
        tier = HostTier.reserve(config, "llama", 4 * GIB, setting="--size")
        counts = TierCounts(HOST, 1536 * MIB, 9 * GIB, 3 * GIB, 12, 3456, 0.5, 0.25)
        on_disk = TierCounts(DISK, 0, 8 * GIB, 5 * GIB, 0, 768, 4.0, 2.5, 40)
        tier.note([counts, on_disk])
        yield directory
        tier.close()


@pytest.mark.usefixtures("folder")
def test_list_says_how_much_is_offloaded_of_what_was_reserved() -> None:
    first, second = said("list").splitlines()
    assert first.endswith("\toffloaded 1.5 GiB of 4 GiB")
    assert "offloaded" not in second


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("command", ["list", "top"])
def test_as_json_everything_that_was_counted_is_there(command: str) -> None:
    (tier,) = json.loads(said(command, "--json"))["tiers"]
    assert (tier["instance"], tier["reserved_bytes"]) == ("llama", 4 * GIB)
    assert [each["tier"] for each in tier["counts"]] == [HOST, DISK]
    assert tier["counts"][0]["hit_tokens"] == 3456


def test_top_has_columns_for_it_where_an_engine_offloads(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    picture = said("top", "--once")
    assert {"offloaded", "loaded", "in", "hits"} <= set(picture.split())
    (line,) = (line for line in picture.splitlines() if line.startswith("llama"))
    assert "1.5 GiB" in line
    assert "3 GiB" in line
    assert "0.2 s" in line  # that took a quarter of a second
    assert "12" in line.split()
    assert "5 GiB in 2.5 s" in line  # from disk
    monkeypatch.setenv("KVCACHED_WEIGHTS_DIR", str(folder / "other"))
    assert "offloaded" not in said("top", "--once")


def test_columns_of_packages_stay_and_who_is_not_there_has_none() -> None:
    gateway = Added("chat", "llama", {"queue": "3"})
    views = [TierView("llama", GIB), TierView("gone", GIB), TierView("qwen", GIB)]
    found = with_tiers([gateway], views, {"llama", "qwen"})
    assert [(each.name, sorted(each.cells)) for each in found] == [
        ("chat", ["hits", "in", "loaded", "offloaded", "queue"]),
        ("qwen", ["hits", "in", "loaded", "offloaded"]),
    ]


def test_metrics_name_the_engine_and_the_tier(folder: Path) -> None:
    found = {
        (sample.name, sample.labels.get("tier")): sample.value
        for family in text_string_to_metric_families(exposition(folder))
        for sample in family.samples
        if sample.labels.get("engine_instance") == "llama" and "offload" in sample.name
    }
    assert found["kvcached_offload_reserved_bytes", None] == 4 * GIB
    assert found["kvcached_offload_held_bytes", HOST] == 1536 * MIB
    assert found["kvcached_offload_stored_bytes_total", HOST] == 9 * GIB
    assert found["kvcached_offload_stored_bytes_total", DISK] == 8 * GIB
    assert found["kvcached_offload_loaded_bytes_total", DISK] == 5 * GIB
    assert found["kvcached_offload_load_seconds_total", DISK] == 2.5
    assert found["kvcached_offload_hit_tokens_total", DISK] == 768
    assert found["kvcached_offload_chunk_hits_total", DISK] == 40
    assert found["kvcached_offload_loaded_bytes_total", HOST] == 3 * GIB
    assert found["kvcached_offload_hits_total", HOST] == 12
    assert found["kvcached_offload_hit_tokens_total", HOST] == 3456
    assert found["kvcached_offload_store_seconds_total", HOST] == 0.5
    assert found["kvcached_offload_load_seconds_total", HOST] == 0.25
    unknown = [("held_bytes", DISK), ("hits_total", DISK), ("chunk_hits_total", HOST)]
    assert not [each for each in unknown if (f"kvcached_offload_{each[0]}", each[1]) in found]


def test_with_settings_that_are_wrong_the_rest_is_shown(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVCACHED_PRIORITY", "high")
    assert tiers(folder) == []
    assert [line.split("\t")[1] for line in said("list").splitlines()] == ["llama", "qwen"]
