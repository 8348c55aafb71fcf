"""Which of SGLang's HiCache is served, what is said of the rest, and what it takes of the host."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from helpers.sglang_elastic import make_engine

from kvcached_core.config import read_config
from kvcached_core.engine import looping
from kvcached_core.engine.joining import Group
from kvcached_core.engine.ranks import Ranks
from kvcached_core.errors import HostBudgetError
from kvcached_core.units import MIB
from kvcached_core.weights.host_budget import HostBudget
from kvcached_core.weights.host_tier import read_tiers
from kvcached_sglang import host_tier
from kvcached_sglang.engine import SglangEngine
from kvcached_sglang.host_tier import is_offloading, size_tier, tier_obstacles
from kvcached_sglang.obstacles import argument_obstacles, model_obstacles

pytestmark = pytest.mark.sglang


def arguments(**changes: Any) -> Any:
    served = {
        "enable_hierarchical_cache": True,
        "hicache_size": 4,
        "hicache_io_backend": "kernel",
        "hicache_mem_layout": "layer_first",
        "hicache_storage_backend": None,
        "hicache_host_memory_mode": "cache",
        "tp_size": 2,
    }
    return SimpleNamespace(**served | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"hicache_storage_backend": "file"},
        {"hicache_storage_backend": "dynamic"},
        {"hicache_mem_layout": "page_first"},
        {"hicache_mem_layout": "page_head"},
        {"hicache_storage_backend": "file", "hicache_host_memory_mode": "buffer_only"},
        {"hicache_io_backend": "direct", "hicache_mem_layout": "page_first_direct"},
        {"enable_hierarchical_cache": False, "hicache_size": 0, "hicache_io_backend": "no"},
    ],
)
def test_what_was_tried_is_served(changes: dict[str, Any]) -> None:
    assert list(tier_obstacles(arguments(**changes))) == []
    assert list(argument_obstacles(arguments(**changes))) == []


@pytest.mark.parametrize(
    ("changes", "said", "instead"),
    [
        ({"hicache_storage_backend": "mooncake"}, "storage backend mooncake", "set --hicache-s"),
        ({"hicache_io_backend": "kernel_ascend"}, "kernel_ascend", "--hicache-io-backend to dir"),
        (
            {"hicache_mem_layout": "page_first_kv_split"},
            "kv_split",
            "--hicache-mem-layout to layer",
        ),
        ({"hicache_host_memory_mode": "other"}, "mode other", "memory-mode to cache"),
    ],
)
def test_the_rest_is_refused_by_name_with_what_to_set(
    changes: dict[str, Any], said: str, instead: str
) -> None:
    (reason,) = argument_obstacles(arguments(**changes))
    assert said in reason
    assert instead in reason
    assert "remove --enable-hierarchical-cache" in reason


def test_a_release_that_needs_a_larger_tier_than_its_pool_is_refused() -> None:
    with patch.object(host_tier, "find_spec", lambda _name: None):
        (reason,) = tier_obstacles(arguments(hicache_size=0))
    assert "install SGLang 0.5.15" in reason


@pytest.mark.parametrize("kind", ["window", "states"])
@pytest.mark.parametrize("is_older", [False, True])
def test_layers_that_differ_are_refused_with_a_tier_of_older_releases(
    monkeypatch: pytest.MonkeyPatch, kind: str, *, is_older: bool
) -> None:
    module = "kvcached_sglang.no_such_module" if is_older else "kvcached_sglang.host_tier"
    monkeypatch.setattr("kvcached_sglang.host_tier._TRANSFERS_MODULE", module)
    runner: Any = SimpleNamespace(
        device="cpu",
        is_hybrid_swa=kind == "window",
        mambaish_config=object() if kind == "states" else None,
        server_args=arguments(max_mamba_cache_size=4),
        model_config=SimpleNamespace(),
    )
    with patch("kvcached_sglang.obstacles._fits_one_pool", lambda _config: True):
        reasons = list(model_obstacles(runner))
    assert is_older == any("HiCache" in reason for reason in reasons)


@pytest.mark.parametrize(
    ("changes", "ratio"),
    [
        ({"hicache_ratio": 1.5}, 1.5),
        ({"hicache_ratio": None}, 2.0),
        ({"hicache_ratio": None, "hicache_host_memory_mode": "buffer_only"}, 1.2),
    ],
)
def test_a_ratio_is_of_what_a_rank_believes_to_have(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], ratio: float
) -> None:
    told: list[int] = []
    monkeypatch.setattr("kvcached_sglang.host_tier._tell_size", told.append)
    monkeypatch.setattr("kvcached_sglang.host_tier._CONTEXT_MODULE", "kvcached_sglang.host_tier")
    cache_bytes = 10**9
    assert size_tier(arguments(hicache_size=0, **changes), cache_bytes) == ratio * 2 * cache_bytes
    assert told == [ratio * cache_bytes]
    assert not list(tier_obstacles(arguments(hicache_size=0, **changes)))
    monkeypatch.setattr("kvcached_sglang.host_tier._CONTEXT_MODULE", "kvcached_sglang.none_such")
    (reason,) = tier_obstacles(arguments(hicache_size=0, **changes))
    assert "set --hicache-size" in reason


def test_its_size_is_what_all_ranks_of_an_instance_take() -> None:
    assert size_tier(arguments(), 0) == 8 * 10**9
    assert size_tier(arguments(pp_size=2), 0) == 16 * 10**9
    assert size_tier(arguments(attn_dp_size=2), 0) == 4 * 10**9  # each instance has one
    assert is_offloading(arguments())
    assert not is_offloading(SimpleNamespace())


def test_a_start_takes_room_in_the_host_budget_and_gives_it_back(tmp_path: Path) -> None:
    config = read_config(
        {
            "KVCACHED_DIR": str(tmp_path / "kv"),
            "KVCACHED_HOST_POOL": str(64 * MIB),
            "KVCACHED_HOST_BUDGET": str(5 * 10**9),
        }
    )

    def start(num_gb: int) -> SglangEngine:
        asked = arguments(
            hicache_size=num_gb,
            tp_size=1,
            served_model_name="m",
            model_path="m",
            max_prefill_tokens=1024,
            load_format="auto",
        )
        return SglangEngine(torch.device("cpu"), asked, 64, config)

    engine = start(4)
    (view,) = read_tiers(HostBudget(config).folder)
    assert (view.instance, view.reserved_bytes) == ("m", 4 * 10**9)
    who = r"the offloaded cache of m-2 needs .* the offloaded cache of m 3\.73 GiB is in use"
    with pytest.raises(HostBudgetError, match=f"{who}; lower --hicache-size"):
        start(2)
    engine.close()
    assert not read_tiers(HostBudget(config).folder)
    plain = make_engine(tmp_path / "plain", host_pool=64 * MIB)
    assert plain.tier is None
    assert plain.copies is None
    plain.close()


def test_a_token_is_counted_on_all_ranks_wherever_they_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def join(device: Any, _group: Group, enter: Any, **_: Any) -> Ranks:
        instance = enter([device])  # the other one has a device of its own
        seat, capacity_bytes = instance.seat(device), instance.capacity_bytes
        return Ranks(instance, seat, capacity_bytes, gather=lambda values: [values, values])

    monkeypatch.setattr(looping, "join_ranks", join)
    asked = arguments(
        hicache_size=1,
        tp_size=2,
        served_model_name="m",
        model_path="m",
        max_prefill_tokens=1024,
        load_format="auto",
    )
    config = read_config({"KVCACHED_DIR": str(tmp_path / "kv"), "KVCACHED_HOST_POOL": "64MiB"})
    engine = SglangEngine(torch.device("cpu"), asked, 64, config, Group(0, (0, 1)))
    pool = SimpleNamespace(size_per_token=7)
    controller = SimpleNamespace(
        write_queue=[], ack_write_queue=[], storage_backend=None, mem_pool_host=pool
    )
    assert engine.copies is not None
    assert engine.tier is not None
    engine.copies.meet(controller)
    engine.copies.store(controller, lambda: None)
    assert (engine.tier.token_bytes, engine.tier.num_bytes) == (2 * 7, 2 * 10**9)
    engine.close()
