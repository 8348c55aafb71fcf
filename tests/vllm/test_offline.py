"""A real vLLM engine answers the same with us, and holds memory only for live tokens."""

import signal
from pathlib import Path
from typing import Any

import pytest
from helpers.engines import Offline, finish

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

POOL = "512MiB"


def elastic(tmp_path: Path, **settings: str) -> dict[str, str]:
    return {
        "ENABLE_KVCACHED": "1",
        "KVCACHED_DIR": str(tmp_path / "kv"),
        "KVCACHED_HOST_POOL": POOL,
        **settings,
    }


@pytest.fixture(
    params=[False, pytest.param(True, marks=pytest.mark.older_release)],
    ids=["prefix caching off", "prefix caching on"],
)
def reports(request: pytest.FixtureRequest, start_offline: Offline, tmp_path: Path) -> Any:
    """What vanilla and elastic vLLM report, run side by side."""
    caching = request.param
    vanilla = start_offline({"ENABLE_KVCACHED": "0"}, caching=caching)
    ours = start_offline(elastic(tmp_path, KVCACHED_DEBUG="1"), caching=caching)
    ended = finish(vanilla), finish(ours)
    for run in ended:
        assert run.returncode == 0, run.errors
    return caching, ended[0].report, ended[1].report


def test_tokens_memory_and_books(reports: Any, tmp_path: Path) -> None:
    caching, vanilla, ours = reports
    page_bytes = ours["page_bytes"]
    (seen,) = ours["view"]["instances"]

    assert ours["tokens"] == vanilla["tokens"]
    assert len({tuple(tokens) for tokens in ours["tokens"][0]}) > 50  # the answers differ at all

    assert ours["after_start"] == page_bytes
    assert ours["after_last"] == seen["resident_bytes"]
    assert seen["resident_bytes"] == (
        seen["used_bytes"] + seen["cached_bytes"] + seen["idle_bytes"]
    )
    if caching:
        assert seen["cached_bytes"] > 2 * page_bytes
    else:
        assert ours["after_last"] <= 2 * page_bytes
    assert ours["usage"] == 0.0

    assert ours["reset"]
    assert ours["after_reset"] <= 2 * page_bytes
    assert ours["after_trim"] == page_bytes
    assert ours["mapped_calls"] > 4
    assert list((tmp_path / "kv").iterdir()) == []


def test_the_debug_setting_finds_a_step_on_unmapped_blocks(
    start_offline: Offline, tmp_path: Path
) -> None:
    run = finish(start_offline(elastic(tmp_path, KVCACHED_DEBUG="1"), caching=False, tamper=True))
    assert run.returncode != 0
    assert "UnmappedBlockError: a step uses unmapped blocks" in run.errors


def test_without_the_debug_setting_such_a_step_faults(
    start_offline: Offline, tmp_path: Path
) -> None:
    run = finish(start_offline(elastic(tmp_path), caching=False, tamper=True))
    assert run.returncode == -signal.SIGSEGV


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"KVCACHED_HOST_POOL": "32MiB"},
            "is what this engine may take here, 32 MiB; raise KVCACHED_HOST_POOL",
        ),
        (
            {"KVCACHED_LIMIT": "65MiB"},
            "needed 64 blocks (64 MiB), available 63 in 4 pages",
        ),
    ],
    ids=["far too small", "by one block"],
)
def test_a_pool_smaller_than_one_request_ends_the_start_with_the_numbers(
    start_offline: Offline, tmp_path: Path, settings: dict[str, str], message: str
) -> None:
    run = finish(start_offline(elastic(tmp_path, **settings), caching=False))
    assert run.returncode != 0
    assert message in run.errors
