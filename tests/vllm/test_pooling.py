"""Models that do not generate: what of them is elastic, and that they answer as without us."""

from pathlib import Path
from typing import Any

import pytest
from helpers.encoder_models import make_encoder
from helpers.engines import Run, run_beside_vanilla
from helpers.scoring_models import make_classifier, make_cross_encoder

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.every_release]

JUDGES = "kvcached: this server embeds or scores prompts"
NOTHING = "kvcached: nothing of this model is elastic: it has no KV cache"


def runs(folder: Path, model: Path, task: str = "embed", **settings: str) -> tuple[Run, Run]:
    """Return how an engine ended without us, and with us."""
    return run_beside_vanilla(folder, model, "pooling", settings, task=task)


def check_vectors(vanilla: Any, elastic: Any) -> None:
    assert elastic["vectors"] == vanilla["vectors"]
    assert len({tuple(vector) for vector in elastic["vectors"][0]}) == len(elastic["vectors"][0])


def test_an_encoder_without_a_kv_cache_says_that_nothing_of_it_is_elastic(tmp_path: Path) -> None:
    vanilla, elastic = runs(tmp_path, make_encoder(tmp_path / "encoder"), KVCACHED_WEIGHTS="yield")
    check_vectors(vanilla.report, elastic.report)
    assert not elastic.report["is_elastic"]
    said = elastic.output + elastic.errors
    assert said.count(NOTHING) == 1


def test_a_model_that_embeds_with_a_kv_cache_shares_it(tmp_path: Path, model: Path) -> None:
    vanilla, elastic = runs(tmp_path, model)
    check_vectors(vanilla.report, elastic.report)
    assert elastic.report["resident"] <= 2 * elastic.report["page_bytes"]


def test_a_cross_encoder_scores_texts_and_says_that_nothing_of_it_is_elastic(
    tmp_path: Path,
) -> None:
    vanilla, elastic = runs(tmp_path, make_cross_encoder(tmp_path / "reranker"), "score")
    check_vectors(vanilla.report, elastic.report)
    assert not elastic.report["is_elastic"]
    assert NOTHING in elastic.output + elastic.errors


@pytest.mark.parametrize(("task", "num_labels"), [("classify", 3), ("score", 1)])
def test_a_decoder_that_judges_texts_shares_its_kv_cache(
    tmp_path: Path, task: str, num_labels: int
) -> None:
    model = make_classifier(tmp_path / "judge", num_labels=num_labels)
    vanilla, elastic = runs(tmp_path, model, task)
    assert (elastic.output + elastic.errors).count(JUDGES) == 1
    check_vectors(vanilla.report, elastic.report)
    assert elastic.report["is_elastic"]
    assert elastic.report["resident"] <= 2 * elastic.report["page_bytes"]
