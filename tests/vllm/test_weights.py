"""A real vLLM engine answers the same whatever of its weights went and came back."""

from pathlib import Path
from typing import Any

import pytest
from helpers.engines import Offline, finish

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture
def reports(start_offline: Offline, tmp_path: Path) -> Any:
    vanilla = start_offline({"ENABLE_KVCACHED": "0"}, "offline_weights", vanilla=True)
    ours = start_offline(yielding(tmp_path), "offline_weights")
    ended = finish(vanilla), finish(ours)
    for run in ended:
        assert run.returncode == 0, run.errors
    return ended[0].report, ended[1].report


def yielding(tmp_path: Path, **settings: str) -> dict[str, str]:
    return {
        "ENABLE_KVCACHED": "1",
        "KVCACHED_DIR": str(tmp_path / "kv"),
        "KVCACHED_HOST_POOL": "128MiB",
        "KVCACHED_WEIGHTS": "yield",
        "KVCACHED_WEIGHTS_KEPT_SECONDS": "0",
        **settings,
    }


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
