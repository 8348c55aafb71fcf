"""An engine whose draft has layers of its own accepts the same tokens with us, and answers alike.

The draft's layers are further planes of each page, so its blocks come and go with the target's.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from helpers.draft_models import (
    DRAFT,
    EAGLE,
    EAGLE3,
    MTP,
    NUM_HEADS,
    NUM_LAYERS,
    TARGET,
    make_draft,
    make_target,
)
from helpers.engines import VANILLA, Offline, offline_in, ours, report_of
from helpers.offload_runs import copier, offloading

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

NUM_DRAFTED = 3
NARROW = "narrow"  # a draft model with half the heads: its blocks are smaller than the target's
ACTS = ("lose_to_a_neighbour", "spoil_the_draft", "spoil_the_target", "give_weights")
# Each rank's threads get a core; the engine reads the bars as "and on the next rank".
CORES = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
# The pool, and what a neighbour can get of it, so that not all requests find room beside it.
MEMORY = {
    EAGLE: ("384MiB", "256MiB"),
    EAGLE3: ("384MiB", "256MiB"),
    DRAFT: ("384MiB", "192MiB"),
    MTP: ("64MiB", "44MiB"),
    NARROW: ("384MiB", "192MiB"),
}
METHODS = [
    EAGLE,
    pytest.param(DRAFT, marks=pytest.mark.every_release),
    pytest.param(NARROW, marks=pytest.mark.every_release),
    pytest.param(EAGLE3, marks=pytest.mark.every_release),
    pytest.param(MTP, marks=pytest.mark.every_release),
]


@dataclass(frozen=True)
class Speculation:
    """A target, and what vLLM is told of its draft."""

    target: Path
    config: dict[str, Any]


def speculation(folder: Path, method: str) -> Speculation:
    target = make_target(folder / TARGET, method)
    if method == MTP:
        return Speculation(target, {"method": method, "num_speculative_tokens": 1})
    num_heads = NUM_HEADS
    if method == NARROW:
        method, num_heads = DRAFT, NUM_HEADS // 2
    draft = str(make_draft(folder / "draft", target, method, num_heads=num_heads))
    tokens = {"num_speculative_tokens": NUM_DRAFTED}
    return Speculation(target, {"method": method, "model": draft, **tokens})


def drafting(folder: Path, **settings: str) -> dict[str, str]:
    return ours(folder, **{"KVCACHED_HOST_POOL": "384MiB", "KVCACHED_DEBUG": "1"} | settings)


@pytest.fixture(scope="module", params=METHODS)
def reports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What an engine with a draft reports, and the same one without us, run side by side."""
    folder = tmp_path_factory.mktemp(request.param)
    made = speculation(folder, request.param)
    start = offline_in(folder, made.target)
    pool, floor = MEMORY[request.param]
    settings = {
        "KVCACHED_HOST_POOL": pool,
        "KVCACHED_WEIGHTS": "yield",
        "KVCACHED_WEIGHTS_KEPT_SECONDS": "0",
        "NEIGHBOUR_FLOOR": floor,
    } | ({"KVCACHED_PAGE_BYTES": "2MiB"} if request.param == MTP else {})
    started = [
        start(VANILLA, "speculating", speculative=made.config),
        start(drafting(folder, **settings), "speculating", speculative=made.config, acts=ACTS),
    ]
    vanilla, elastic = map(report_of, started)
    return vanilla, elastic


def test_tokens_and_acceptance_are_those_of_vanilla(reports: Any) -> None:
    vanilla, elastic = reports
    assert elastic["tokens"] == vanilla["tokens"]
    assert len({tuple(tokens) for tokens in vanilla["tokens"]}) > 15
    counts = vanilla["counts"]
    assert elastic["counts"] == counts
    assert 0.2 <= counts["accepted"] / counts["drafted"] <= 0.8


def test_the_layers_of_a_draft_are_planes_of_each_page_and_nothing_stays(reports: Any) -> None:
    _, elastic = reports
    planes, of_draft = elastic["planes"], elastic["draft_planes"]
    assert of_draft == planes[NUM_LAYERS:]
    assert of_draft
    assert elastic["after_last"] <= 2 * elastic["page_bytes"]
    assert elastic["at_the_end"] <= 2 * elastic["page_bytes"]


def test_a_neighbour_that_takes_memory_of_requests_with_drafts_changes_no_token(
    reports: Any,
) -> None:
    vanilla, elastic = reports
    assert elastic["num_with_draft"] > 0
    assert elastic["num_preempted"] > 0
    assert elastic["tokens_beside_neighbour"] == vanilla["tokens"]


def test_wrong_blocks_of_a_draft_change_what_is_accepted_and_no_token(reports: Any) -> None:
    vanilla, elastic = reports
    assert elastic["accepted_of_wrong_draft"] != vanilla["counts"]["by_position"]
    assert elastic["tokens_of_wrong_draft"] == vanilla["tokens"]


def test_wrong_blocks_of_the_target_change_tokens(reports: Any) -> None:
    vanilla, elastic = reports
    assert elastic["tokens_of_wrong_target"] != vanilla["tokens"]


def test_a_draft_gives_its_weights_with_those_of_its_target(reports: Any) -> None:
    vanilla, elastic = reports
    assert all(elastic["draft_weights"])
    assert elastic["asleep_weight_pages"] == 0
    assert elastic["tokens_after_sleep"] == vanilla["tokens"]
    assert elastic["accepted_after_sleep"] == vanilla["counts"]["by_position"]


@pytest.mark.every_release
def test_tokens_of_ngrams_are_accepted_as_by_vanilla_and_nothing_stays(tmp_path: Path) -> None:
    model = make_target(tmp_path / TARGET, EAGLE)
    start = offline_in(tmp_path, model)
    ngrams = {"method": "ngram", "num_speculative_tokens": NUM_DRAFTED, "prompt_lookup_min": 1}
    # Answers that are long enough to come back to what they said.
    asked = {"speculative": {**ngrams, "prompt_lookup_max": 3}, "num_tokens": 96}
    acts = ["lose_to_a_neighbour", "spoil_the_target"]
    environ = drafting(tmp_path, NEIGHBOUR_FLOOR="256MiB")
    started = [
        start(VANILLA, "speculating", **asked),
        start(environ, "speculating", **asked, acts=acts),
    ]
    vanilla, elastic = map(report_of, started)
    assert elastic["tokens"] == vanilla["tokens"]
    assert elastic["counts"] == vanilla["counts"]
    counts = vanilla["counts"]
    assert 0.2 <= counts["accepted"] / counts["drafted"] <= 0.8
    assert elastic["draft_planes"] == []
    assert min(elastic["num_with_draft"], elastic["num_preempted"]) > 0
    assert elastic["tokens_beside_neighbour"] == vanilla["tokens"]
    assert elastic["tokens_of_wrong_target"] != vanilla["tokens"]
    assert elastic["after_last"] <= 2 * elastic["page_bytes"]
    assert elastic["at_the_end"] <= 2 * elastic["page_bytes"]


@pytest.mark.every_release
def test_a_draft_comes_through_a_sleep_of_vllms(start_offline: Offline, tmp_path: Path) -> None:
    made = speculation(tmp_path, EAGLE)
    start = offline_in(tmp_path, made.target)
    acts = ["sleep_and_wake"]
    report = report_of(start(drafting(tmp_path), "speculating", speculative=made.config, acts=acts))
    assert report["asleep_bytes"] == report["page_bytes"]
    assert report["tokens_after_wake"] == report["tokens"]
    assert report["accepted_after_wake"] == report["counts"]["by_position"]


@pytest.mark.every_release
def test_two_ranks_with_a_draft_answer_as_vanilla(tmp_path: Path) -> None:
    made = speculation(tmp_path, EAGLE)
    start = offline_in(tmp_path, made.target)
    environ = drafting(tmp_path, KVCACHED_HOST_POOL="512MiB", KVCACHED_WEIGHTS="yield")
    started = [
        start(CORES | one, "two_ranks", speculative_config=made.config)
        for one in (VANILLA, environ)
    ]
    vanilla, elastic = map(report_of, started)
    assert elastic["tokens"] == vanilla["tokens"]
    first, second = elastic["pages"]
    assert first == second
    assert len(first) <= 2
    assert elastic["asleep_pages"] == [0, 0]
    assert elastic["tokens_after_sleep"] == vanilla["tokens"]


@pytest.mark.every_release
def test_blocks_of_a_draft_come_back_from_the_host_tier(tmp_path: Path) -> None:
    made = speculation(tmp_path, EAGLE)
    start = offline_in(tmp_path, made.target)
    options = {"speculative_config": made.config}
    started = [
        start(VANILLA, "offload_rounds", options=options),
        start(offloading(tmp_path), "offload_rounds", copier=copier(tmp_path), options=options),
    ]
    plain, elastic = map(report_of, started)
    assert elastic["tokens"] == plain["tokens"]
    assert elastic["num_hit_tokens"] > 0
