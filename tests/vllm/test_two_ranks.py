"""Two ranks of one engine: the same pages on both, one promise for both, the same tokens."""

from pathlib import Path
from typing import Any

import pytest
from helpers.engines import VANILLA, Offline, end_well, offline_in, ours, report_of

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

# Each rank's threads get a core; the engine reads the bars as "and on the next rank".
CORES = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}


@pytest.fixture(scope="module")
def reports(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """What vanilla reports, and an elastic engine whose weights yield, run side by side."""
    folder = tmp_path_factory.mktemp("ranks")
    start = offline_in(folder, model)
    environ = ours(folder, KVCACHED_DEBUG="1", KVCACHED_WEIGHTS="yield")
    started = [start(CORES | one, "two_ranks") for one in (VANILLA, environ)]
    vanilla, elastic = map(end_well, started)
    assert "Traceback" not in elastic.errors
    return vanilla.report, elastic.report


def check(report: Any, vanilla: Any) -> None:
    """See that both ranks hold the same, as little as they need, and answer as vanilla does."""
    assert report["tokens"] == vanilla["tokens"]
    first, second = report["pages"]
    assert first == second
    assert len(first) <= 2
    (view,) = report["view"]
    held_bytes = view["resident_bytes"] - view["weights_bytes"]
    assert held_bytes == 2 * len(first) * report["page_bytes"]
    assert view["promised_bytes"] == 0


def test_tensor_parallel_ranks_map_the_same_pages_and_answer_as_vanilla(
    reports: tuple[Any, Any],
) -> None:
    vanilla, elastic = reports
    check(elastic, vanilla)


def test_tensor_parallel_ranks_give_their_weights_and_have_them_back_alike(
    reports: tuple[Any, Any],
) -> None:
    vanilla, elastic = reports
    assert elastic["asleep_pages"] == [0, 0]
    assert min(elastic["awake_pages"]) > 1
    assert elastic["tokens_after_sleep"] == vanilla["tokens"]
    (view,) = elastic["view"]
    assert view["weights_bytes"] == view["weights_needed_bytes"] > 0


@pytest.mark.every_release  # under `make test` ranks whose weights yield, above
def test_ranks_that_keep_their_weights_do_the_same(
    start_offline: Offline, tmp_path: Path, reports: tuple[Any, Any]
) -> None:
    started = start_offline(CORES | ours(tmp_path, KVCACHED_DEBUG="1"), "two_ranks")
    check(report_of(started), reports[0])
