"""A real vLLM engine answers the same with us, and holds memory only for live tokens."""

import signal
from pathlib import Path

import pytest
from helpers.engines import VANILLA, Offline, Started, finish, offline_in, ours, report_of

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def vanilla(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Started:
    """Start vanilla vLLM, beside the first elastic one; its cache may not change a token."""
    start = offline_in(tmp_path_factory.mktemp("vanilla"), model)
    return start(VANILLA, caching=False)


@pytest.mark.parametrize(
    "caching",
    [
        pytest.param(False, marks=pytest.mark.every_release),
        pytest.param(True, marks=pytest.mark.older_release),
    ],
    ids=["prefix caching off", "prefix caching on"],
)
def test_tokens_memory_and_books(
    vanilla: Started, start_offline: Offline, tmp_path: Path, *, caching: bool
) -> None:
    started = start_offline(ours(tmp_path, KVCACHED_DEBUG="1"), caching=caching)
    theirs, elastic = report_of(vanilla), report_of(started)
    page_bytes = elastic["page_bytes"]
    (seen,) = elastic["view"]["instances"]

    assert elastic["tokens"] == theirs["tokens"]
    assert len({tuple(tokens) for tokens in elastic["tokens"][0]}) > 50  # the answers differ at all

    assert elastic["after_start"] == page_bytes
    assert elastic["after_last"] == seen["resident_bytes"]
    assert seen["resident_bytes"] == (
        seen["used_bytes"] + seen["cached_bytes"] + seen["idle_bytes"]
    )
    if caching:
        assert seen["cached_bytes"] > 2 * page_bytes
    else:
        assert elastic["after_last"] <= 2 * page_bytes
    assert elastic["usage"] == 0.0

    assert elastic["reset"]
    assert elastic["after_reset"] <= 2 * page_bytes
    assert elastic["after_trim"] == page_bytes
    assert elastic["mapped_calls"] > 4
    assert list((tmp_path / "kv").iterdir()) == []


@pytest.mark.every_release
def test_the_debug_setting_finds_a_step_on_unmapped_blocks(
    start_offline: Offline, tmp_path: Path
) -> None:
    run = finish(start_offline(ours(tmp_path, KVCACHED_DEBUG="1"), caching=False, tamper=True))
    assert run.returncode != 0
    assert "UnmappedBlockError: a step uses unmapped blocks" in run.errors


def test_without_the_debug_setting_such_a_step_faults(
    start_offline: Offline, tmp_path: Path
) -> None:
    run = finish(start_offline(ours(tmp_path), caching=False, tamper=True))
    assert run.returncode == -signal.SIGSEGV


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"KVCACHED_HOST_POOL": "32MiB"},
            "is what this engine may take here, 32 MiB; raise KVCACHED_HOST_POOL",
        ),
        pytest.param(
            {"KVCACHED_LIMIT": "65MiB"},
            "needed 64 blocks (64 MiB), available 63 in 4 pages",
            marks=pytest.mark.every_release,  # under `make test` in tests/core/test_placing.py
        ),
    ],
    ids=["far too small", "by one block"],
)
def test_a_pool_smaller_than_one_request_ends_the_start_with_the_numbers(
    start_offline: Offline, tmp_path: Path, settings: dict[str, str], message: str
) -> None:
    run = finish(start_offline(ours(tmp_path, **settings), caching=False))
    assert run.returncode != 0
    assert message in run.errors
