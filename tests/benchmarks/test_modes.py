"""What each mode starts its servers with."""

from dataclasses import replace
from pathlib import Path

import pytest
from multi_model.modes import Member, ModeError, Site, members

from kvcached_core.units import GIB

GPU = Site(
    is_host=False,
    kv_bytes_per_token=1024,
    pool_bytes=None,
    device_bytes=100 * GIB,
    cap_bytes=80 * GIB,
)
POOL = Site(is_host=True, kv_bytes_per_token=1024, pool_bytes=3 * GIB)


def value(found: Member, option: str) -> str:
    return found.arguments[found.arguments.index(option) + 1]


def plans(mode: str, site: Site, *kinds: str) -> list[Member]:
    return members(mode, site, kinds, [0.5, 0.25, 0.25][: len(kinds)], Path("/run"))


def test_static_splits_the_part_of_the_device_that_may_be_used_evenly() -> None:
    found = plans("static", GPU, "vllm", "vllm")
    assert [value(each, "--gpu-memory-utilization") for each in found] == ["0.400"] * 2
    assert all(each.starts_alone for each in found)  # each looks at what is free


def test_static_tuned_splits_by_need() -> None:
    found = plans("static-tuned", POOL, "vllm", "vllm", "sglang")
    assert [each.kv_bytes for each in found] == [3 * GIB // 2, 3 * GIB // 4, 3 * GIB // 4]
    assert value(found[2], "--max-total-tokens") == str(3 * GIB // 4 // 1024)


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


@pytest.mark.parametrize(("mode", "site"), [("sleep-swap", POOL), ("elastik", GPU)])
def test_a_mode_that_cannot_be_run_is_refused_with_the_reason(mode: str, site: Site) -> None:
    with pytest.raises(ModeError, match=mode):
        plans(mode, site, "vllm")
