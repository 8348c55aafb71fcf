"""What each mode starts its servers with."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.waiting import PATIENCE_SECONDS
from multi_model import upstream
from multi_model.errors import ModeError
from multi_model.modes import Member, Site, members

from kvcached_core.units import GIB

GPU = Site(
    is_host=False,
    kv_bytes_per_token=1024,
    pool_bytes=None,
    device_bytes=100 * GIB,
    cap_bytes=80 * GIB,
    weights_bytes=15 * GIB,
)
POOL = Site(is_host=True, kv_bytes_per_token=1024, pool_bytes=3 * GIB)


def value(found: Member, option: str) -> str:
    return found.arguments[found.arguments.index(option) + 1]


def plans(mode: str, site: Site, *kinds: str) -> list[Member]:
    return members(mode, site, kinds, [0.5, 0.25, *[0.25] * 30][: len(kinds)], Path("/run"))


def test_static_splits_the_part_of_the_device_that_may_be_used_evenly() -> None:
    found = plans("static", GPU, "vllm", "vllm")
    assert [value(each, "--gpu-memory-utilization") for each in found] == ["0.400"] * 2
    assert all(each.starts_alone for each in found)  # each looks at what is free


def test_static_tuned_splits_by_need_and_leaves_each_room_for_a_request() -> None:
    found = plans("static-tuned", POOL, "vllm", "vllm", "sglang")
    request_bytes = 4096 * 1024
    rest_bytes = 3 * GIB - 3 * request_bytes
    wanted = [request_bytes + rest_bytes // part for part in (2, 4, 4)]
    assert [each.kv_bytes for each in found] == pytest.approx(wanted, abs=1)
    assert value(found[2], "--max-total-tokens") == str((found[2].kv_bytes or 0) // 1024)
    kinds = ["vllm"] * 2
    _, unasked = members("static-tuned", POOL, kinds, [1.0, 0.0], Path("/run"))
    assert unasked.kv_bytes == request_bytes


def test_static_tuned_splits_what_weights_and_engines_leave_of_a_device() -> None:
    kinds, shares, weights = ["vllm"] * 2, [0.9, 0.1], [15 * GIB, 5 * GIB]
    found = members("static-tuned", GPU, kinds, shares, Path("/run"), weights)
    gib = [18 + 0.9 * 54, 8 + 0.1 * 54]  # of 80: 20 of weights, 6 of engines, 54 to split
    said = [float(value(each, "--gpu-memory-utilization")) * 100 for each in found]
    assert said == pytest.approx(gib, abs=0.05)
    with pytest.raises(ModeError, match="static-tuned: 5 models need 90"):
        plans("static-tuned", GPU, *["vllm"] * 5)


def test_elastic_engines_get_no_size_and_one_headroom() -> None:
    vllm, sglang = plans("elastic", GPU, "vllm", "sglang")
    assert vllm.environ["ENABLE_KVCACHED"] == "1"
    assert "--enable-kvcached" in sglang.arguments
    assert "--gpu-memory-utilization" not in vllm.arguments
    assert {each.environ["KVCACHED_HEADROOM"] for each in (vllm, sglang)} == {str(20 * GIB)}
    assert not vllm.starts_alone


def test_a_page_size_is_told_to_elastic_engines_alone() -> None:
    site = replace(POOL, page_bytes="2MiB")
    assert plans("elastic", site, "vllm")[0].environ["KVCACHED_PAGE_BYTES"] == "2MiB"
    assert "KVCACHED_PAGE_BYTES" not in plans("static", site, "vllm")[0].environ
    assert "KVCACHED_PAGE_BYTES" not in plans("elastic", POOL, "vllm")[0].environ


def test_prefix_caching_is_off_or_on_for_every_engine() -> None:
    off = plans("static", POOL, "vllm", "sglang")
    assert "--no-enable-prefix-caching" in off[0].arguments
    assert "--disable-radix-cache" in off[1].arguments
    on = plans("static", replace(POOL, caching=True), "vllm", "sglang")
    assert "--enable-prefix-caching" in on[0].arguments
    assert "--disable-radix-cache" not in on[1].arguments


def test_models_of_a_gpu_have_weights_of_their_own() -> None:
    first, second = plans("static", GPU, "vllm", "vllm")
    assert (first.environ["DUMMY_SEED"], second.environ["DUMMY_SEED"]) == ("0", "1")
    assert "helpers.seeded.Seeded" in first.options
    assert "DUMMY_SEED" not in plans("static", POOL, "vllm")[0].environ


def test_sleep_mode_is_the_gpus_alone_and_a_host_rehearses_its_turns() -> None:
    assert "--enable-sleep-mode" in plans("sleep-swap", GPU, "vllm")[0].arguments
    two = plans("sleep-swap", GPU, "vllm", "vllm")  # room for what one that sleeps still holds
    assert [each.kv_bytes for each in two] == [(80 - 3 - 15 - 3) * GIB] * 2
    assert value(two[0], "--kv-cache-memory-bytes") == str(two[0].kv_bytes)
    with pytest.raises(ModeError, match="27 models that sleep hold 81"):
        plans("sleep-swap", GPU, *["vllm"] * 28)
    assert len(plans("gateway", GPU, *["vllm"] * 28)) == 28  # which has no such need
    awake = replace(GPU, num_awake=2)  # both have their weights and as much KV memory
    three = plans("sleep-swap", awake, *["vllm"] * 3)
    assert [each.kv_bytes for each in three] == [int((80 - 3) / 2 * GIB) - 18 * GIB] * 3
    with pytest.raises(ModeError, match="of 1 models 2 cannot be awake"):
        plans("sleep-swap", awake, "vllm")
    lean = replace(awake, sleeping_bytes=GIB)  # who has measured it leaves less
    three = plans("sleep-swap", lean, *["vllm"] * 3)
    assert [each.kv_bytes for each in three] == [int((80 - 1) / 2 * GIB) - 16 * GIB] * 3
    (host,) = plans("sleep-swap", POOL, "vllm")
    assert "--enable-sleep-mode" not in host.arguments
    assert host.environ["VLLM_SERVER_DEV_MODE"] == "1"


def test_as_many_start_asleep_at_a_time_as_the_device_holds() -> None:
    two = plans("sleep-swap", GPU, "vllm", "vllm")
    assert GPU.num_starting(two) == 1  # 74 GiB each, and the device has 100
    larger = replace(GPU, device_bytes=160 * GIB)
    assert larger.num_starting(two) == 2
    assert replace(GPU, device_bytes=10 * GIB).num_starting(two) == 1
    assert POOL.num_starting(plans("sleep-swap", POOL, "vllm")) == 1


def test_a_model_that_is_swapped_in_has_all_that_may_be_used() -> None:
    (found,) = plans("swap", GPU, "vllm")
    assert value(found, "--gpu-memory-utilization") == "0.800"
    assert plans("swap", POOL, "vllm", "vllm")[1].kv_bytes == 3 * GIB


def test_a_gateways_engines_are_elastic_ones() -> None:
    (found,) = plans("gateway", GPU, "vllm")
    assert found.environ["ENABLE_KVCACHED"] == "1"
    assert "--gpu-memory-utilization" not in found.arguments


def test_the_other_kvcached_is_started_as_its_documents_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(upstream, "check", lambda _python, _vllm: {})
    site = replace(GPU, upstream_python="/there/bin/python")
    first, second = plans("upstream", site, "vllm", "vllm")
    assert first.python == "/there/bin/python"
    assert (first.environ["ENABLE_KVCACHED"], first.environ["KVCACHED_AUTOPATCH"]) == ("true", "1")
    assert first.environ["KVCACHED_IPC_NAME"] != second.environ["KVCACHED_IPC_NAME"]
    assert str(os.getpid()) in first.environ["KVCACHED_IPC_NAME"]  # another run has other names
    assert first.environ["KVCACHED_GPU_UTILIZATION"] == "0.800"  # 80 of 100 GiB, as all others
    assert "--no-enable-prefix-caching" in first.arguments
    words = (*first.options, *first.arguments)
    assert not {"--gpu-memory-utilization", "--kv-cache-memory-bytes"} & set(words)
    assert "helpers.seeded.Seeded" not in words
    assert not first.environ["PYTHONPATH"]


def test_a_started_process_is_the_other_interpreters(tmp_path: Path) -> None:
    log = tmp_path / "log"
    launch = upstream.launch_with("/bin/echo")
    (found,) = plans("static", POOL, "vllm")
    process = launch(found, ["/usr/bin/python", "-m", "vllm"], {}, log)
    assert process.wait(PATIENCE_SECONDS) == 0
    assert log.read_text() == "-m vllm\n"


@pytest.mark.parametrize(
    ("mode", "site", "kinds", "message"),
    [
        ("elastik", GPU, ("vllm",), "'elastik' is not one of"),
        ("sleep-swap", GPU, ("vllm", "sglang"), "sleep-swap is made of vLLM's engines"),
        ("gateway", POOL, ("sglang",), "gateway is made of vLLM's engines"),
        ("gateway", replace(GPU, pool_bytes=GIB), ("vllm",), "--cap-gib"),
        ("upstream", replace(GPU, pool_bytes=GIB), ("vllm",), "--cap-gib"),
        ("upstream", POOL, ("vllm",), "upstream needs a GPU"),
        ("upstream", GPU, ("vllm",), "--upstream-python"),
    ],
)
def test_a_mode_that_cannot_be_run_is_refused_with_the_reason(
    mode: str, site: Site, kinds: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ModeError, match=message):
        plans(mode, site, *kinds)


def test_offloading_is_elastic_with_a_tier_on_a_gpu_and_on_a_host(tmp_path: Path) -> None:
    gpu = replace(GPU, caching=True, tier_bytes=3 * GIB // 2)
    (found,) = plans("offload", gpu, "vllm")
    assert value(found, "--kv-offloading-size") == "1.5"
    assert found.environ["ENABLE_KVCACHED"] == "1"
    (plain,) = plans("elastic", gpu, "vllm")
    assert set(found.arguments) - set(plain.arguments) == {"--kv-offloading-size", "1.5"}
    host = replace(POOL, caching=True, tier_bytes=GIB)
    (found,) = members("offload", host, ["vllm"], [1.0], tmp_path)
    config = json.loads(value(found, "--kv-transfer-config"))
    assert config["kv_connector_extra_config"]["cpu_bytes_to_use"] == GIB
    assert str(tmp_path / "plugin") in found.environ["PYTHONPATH"]


@pytest.mark.parametrize("site", [replace(GPU, tier_bytes=GIB), replace(GPU, caching=True)])
def test_offloading_needs_a_cache_and_room(site: Site) -> None:
    with pytest.raises(ModeError, match="--caching and --tier-gib"):
        plans("offload", site, "vllm")
