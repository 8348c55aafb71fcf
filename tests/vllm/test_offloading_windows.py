"""Blocks of layers that keep only the last tokens are copied to the host, and come back.

A window leaves blocks behind while its request runs, and vLLM may store such a block later.
"""

from pathlib import Path
from typing import Any

import pytest
from helpers.engines import VANILLA, Started, finish, offline_in, report_of
from helpers.offload_runs import (
    GONE,
    MIB,
    check_race,
    copier,
    end_of,
    offloading,
    race,
    rounds_like_vanilla,
    two_ranks,
)
from helpers.window_models import (
    make_small_window_model,
    make_state_model,
    make_window_model,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import (
    OffloadingConnectorScheduler,
)

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.every_release]

looks_again = pytest.mark.skipif(
    not hasattr(OffloadingConnectorScheduler, "_final_swa_alignment_blocks"),
    reason="before 0.30 vLLM does not look again at what it has passed over",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_window_model(tmp_path_factory.mktemp("models") / "windows", seed=1)


@pytest.mark.parametrize("chunk_blocks", [1, 4])
def test_what_a_window_needs_comes_back_after_the_memory_was_given(
    model: Path, tmp_path: Path, chunk_blocks: int
) -> None:
    acts = ["one_by_one", "last_request", "load_other_blocks"]
    report = rounds_like_vanilla(tmp_path, model, acts, chunk_blocks=chunk_blocks)
    assert report["spoiled_hits"] > 0
    assert report["spoiled_tokens"] != report["tokens"][0]  # what comes back is what is read
    assert len(report["pages_after_last"][0]) <= 2


def without_room(folder: Path, model: Path, **options: Any) -> Started:
    """Start an engine whose tier has no room until pages of freed blocks went."""
    environ = offloading(folder, KVCACHED_PAGE_BYTES="2MiB")
    of_copier = copier(folder, num_bytes=20 * MIB, delay_ms=(0, 5))
    return offline_in(folder, model)(environ, "offload_windows", copier=of_copier, **options)


def test_a_block_whose_page_went_is_not_stored_when_the_tier_has_room(
    model: Path, tmp_path: Path
) -> None:
    report = report_of(without_room(tmp_path, model))
    assert report["num_jobs_without_room"] == 0
    assert report["num_pages_gone"] == 0
    full, window = report["num_named"]
    assert 0 < window < full
    assert report["is_right"]
    assert report["is_right_again"]


def test_it_is_read_without_memory_where_vllm_goes_on_to_name_it(
    model: Path, tmp_path: Path
) -> None:
    run = finish(without_room(tmp_path, model, forgets=False))
    assert run.returncode != 0
    assert any(word in end_of(run) + run.errors for word in GONE), run.errors[-4000:]


@pytest.mark.parametrize("chunk_blocks", [1, 4])
def test_no_copy_of_a_window_meets_a_page_that_was_given_away(
    model: Path, tmp_path: Path, chunk_blocks: int
) -> None:
    start, numbers = offline_in(tmp_path, model), {"seed": 0, "num_requests": 150}
    prefix_tokens = (250, 420)
    check_race(
        race(start, tmp_path, **numbers, chunk_blocks=chunk_blocks, prefix_tokens=prefix_tokens)
    )


def test_no_chunk_lacks_what_a_hit_loads_as_it_does_in_vllm_alone(
    model: Path, tmp_path: Path
) -> None:
    start = offline_in(tmp_path, model)
    changes = {"num_bytes": 24 * MIB, "delay_ms": (0, 1), "blocks_per_chunk": 4}
    of_copier = copier(tmp_path, **changes, copier_report=None)
    started = [
        start(one, "offload_chunks", copier=of_copier) for one in (VANILLA, offloading(tmp_path))
    ]
    vanilla, elastic = map(report_of, started)
    for report in (vanilla, elastic):
        assert report["behind"]["cached"]
        assert report["at"] == {"cached": True, "hit_tokens": 256, "is_right": True}
    assert vanilla["behind"] == {"cached": True, "hit_tokens": 256, "is_right": False}
    assert elastic["behind"]["is_right"]
    assert len(elastic["pages"][0]) <= 2


def of_tails(folder: Path, **options: Any) -> dict[str, Any]:
    """Return what a tier has of a request whose blocks another one gets at its end."""
    start = offline_in(folder, make_small_window_model(folder / "small_windows", seed=1))
    of_copier = copier(folder, delay_ms=(0, 1), offload_prompt_only=False)
    report: dict[str, Any] = report_of(
        start(offloading(folder), "offload_tails", copier=of_copier, **options)
    )
    return report


@looks_again
def test_what_the_end_of_a_request_makes_worth_storing_is_its_own(tmp_path: Path) -> None:
    report = of_tails(tmp_path)
    assert report["num_alone"] > report["num_same"] > 0
    assert report["num_other"] == 0
    assert len(report["pages"][0]) <= 2


@looks_again
def test_it_is_anothers_where_nobody_looks_who_has_the_blocks(tmp_path: Path) -> None:
    assert of_tails(tmp_path, watches=False)["num_other"] > 0


def test_copies_of_windows_end_when_both_ranks_have_reported(model: Path, tmp_path: Path) -> None:
    report, vanilla = two_ranks(offline_in(tmp_path, model), tmp_path)
    assert report["tokens"] == vanilla["tokens"]
    assert report["after_trim"] == [[[0], [0]]]
    assert report["num_told_tokens"] == report["num_hit_tokens"] > 0
    assert report["kept_by_one_rank"]
    assert all(report["kept_by_one_rank"])
    assert report["after_both_ranks"] == [[0], [0]]


def test_vllm_alone_gives_other_answers_from_states_that_come_back(tmp_path: Path) -> None:
    start = offline_in(tmp_path, make_state_model(tmp_path / "states"))
    started = [
        start(VANILLA, "offload_rounds"),
        start(VANILLA, "offload_rounds", copier=copier(tmp_path)),
    ]
    plain, offloaded = map(report_of, started)
    first, again = plain["tokens"]
    assert first == again == offloaded["tokens"][0]
    assert offloaded["num_hit_tokens"] > 0
    assert offloaded["tokens"][1] != again  # else they may be served
