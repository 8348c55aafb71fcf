"""A real vLLM engine answers the same whatever of its weights went and came back."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from helpers.adapter import make_adapter
from helpers.engines import VANILLA, Offline, finish, report_of, yielding

from kvcached_core.weights.moves import read_moves
from kvcached_demo.harness.model import make_model

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


# Under `make test` tied weights are those of test_weight_binding.py, and of a server of SGLang's.
@pytest.fixture(
    params=[
        pytest.param(False, marks=pytest.mark.older_release),
        pytest.param(True, marks=pytest.mark.every_release),
    ],
    ids=["own head", "tied"],
)
def reports(
    request: pytest.FixtureRequest, start_offline: Offline, tmp_path: Path, model: Path
) -> Any:
    """What vanilla and elastic vLLM report, of a model whose head may be its embedding."""
    if request.param:
        tie(model, tmp_path / "tied")
    options = {"model": str(tmp_path / "tied")} if request.param else {}
    started = [
        start_offline(VANILLA, "offline_weights", vanilla=True, **options),
        start_offline(yielding(tmp_path), "offline_weights", **options),
    ]
    vanilla, ours = map(report_of, started)
    return vanilla, ours


def tie(model: Path, folder: Path) -> None:
    """Copy a model, and let its head be its embedding."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))


def test_answers_are_those_of_vanilla_whatever_became_of_the_weights(reports: Any) -> None:
    vanilla, ours = reports
    assert ours["tokens"] == vanilla["tokens"]
    num_pages = ours["num_pages"]
    assert num_pages > 4
    assert ours["static_bytes"] == 0
    assert ours["steps"] == [
        [kept, kept, num_pages - kept, True, num_pages] for kept in range(num_pages + 1)
    ]
    assert ours["slept"]

    assert (ours["asleep_pages"], ours["woken_pages"]) == (0, num_pages)
    assert ours["after_wake_up"]

    assert ours["changed_differs"]
    assert ours["changed_slept"]
    assert ours["changed_while_dropped"]
    assert ours["changed_back_slept"]
    assert ours["replaced"]
    assert ours["replaced_slept"]
    assert ours["reloaded"]
    assert ours["reloaded_slept"]

    assert ours["wrong_page_is_seen"]


@pytest.mark.every_release
def test_buffers_go_first_and_come_back_with_the_weights(
    start_offline: Offline, tmp_path: Path
) -> None:
    settings = yielding(tmp_path, KVCACHED_BUFFERS="yield")
    report = report_of(start_offline(settings, "offline_weights", buffers=32 << 10))
    assert report["num_bytes"] > 0
    assert report["same"] == [True, True, True]
    (buffers, woken, all_given, again) = report["held"]
    assert buffers[:2] == [0, 0]
    assert buffers[2] > 0
    assert all_given[0] == 0
    assert all_given[1] > 1
    assert all_given[2] == all_given[1] + buffers[2]
    assert woken == again == [report["num_bytes"], 0, 0, 0]
    assert buffers[3] == all_given[3] == 0  # the ledger knows
    assert report["spoiled_differs"]


def test_an_adapter_answers_as_before_and_stays_where_it_is(
    start_offline: Offline, tmp_path: Path, model: Path
) -> None:
    adapter = make_adapter(tmp_path / "adapter", model)
    report = report_of(start_offline(yielding(tmp_path), "offline_weights", adapter=str(adapter)))
    expected = {"differ": True, "same": [True] * 5, "is_added": True, "is_shared": True}
    assert report == expected


def test_a_step_on_weights_that_are_not_there_ends_the_process(
    start_offline: Offline, tmp_path: Path
) -> None:
    run = finish(start_offline(yielding(tmp_path), "offline_weights", tamper=True))
    assert run.report == {"is_asleep": True}
    assert run.returncode == -signal.SIGSEGV


POOL = "20MiB"  # for the weights of one of two engines, and a request


NUM_REQUESTS = 80


@pytest.mark.parametrize("has_disk", [False, pytest.param(True, marks=pytest.mark.every_release)])
def test_engines_whose_weights_do_not_fit_together_answer_in_turn_and_outlive_a_kill(
    start_offline: Offline, tmp_path: Path, *, has_disk: bool
) -> None:
    other = make_model(tmp_path / "other-llama", seed=2)
    disk = {
        "KVCACHED_WEIGHTS_DISK": str(tmp_path / "disk"),
        "KVCACHED_WEIGHTS_DISK_FREE": "0",
        "KVCACHED_HOST_BUDGET": "15MiB",  # for the copy of one of them
    }
    environ = yielding(
        tmp_path,
        KVCACHED_HOST_POOL=POOL,
        KVCACHED_PAGE_BYTES="2MiB",
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
        VLLM_ALLOW_INSECURE_SERIALIZATION="1",
        **(disk if has_disk else {}),
    )
    report = report_of(
        start_offline(environ, "two_weights", other=str(other), num_requests=NUM_REQUESTS)
    )
    assert sum(report["weights_needed_bytes"]) > report["pool_bytes"]
    assert report["resident_bytes"] <= report["pool_bytes"]
    assert report["differ"]
    assert report["right"] == [True] * NUM_REQUESTS
    assert report["right_at_once"] == [True] * 10
    assert min(report["num_activations"]) >= NUM_REQUESTS // 2 - 1

    assert report["died"]
    assert report["right_after_kill"] == [True] * 4
    assert report["started_again"]
    assert report["right_in_the_end"] == [True] * 6
    if has_disk:  # each turn has brought one back
        assert read_moves(tmp_path / "disk").num_read >= NUM_REQUESTS // 2


@pytest.mark.every_release
def test_an_engine_wakes_out_of_a_replica_and_answers_as_before(
    start_offline: Offline, tmp_path: Path
) -> None:
    environ = yielding(
        tmp_path,
        KVCACHED_WEIGHTS_REPLICAS="1",
        KVCACHED_PAGE_BYTES="2MiB",
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
        VLLM_ALLOW_INSECURE_SERIALIZATION="1",
    )
    report = report_of(start_offline(environ, "two_replicas"))
    assert report["same"]
    assert report["awake_bytes"][0] > 0
    assert report["asleep_bytes"] == [0, report["awake_bytes"][1]]
    assert all(report["from_replica"])
    assert all(report["replica"])
    assert not all(report["from_spoiled_copy"])  # so the others came from the replica
