"""What vLLM publishes of its prefix cache tells a router what is in it, whatever becomes of it.

The events go through vLLM's own publisher; the mirror that is compared knows nothing else.
"""

from pathlib import Path
from typing import Any

import pytest
from helpers.engines import Offline, ours, report_of

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

NUM_OPERATIONS = [300, pytest.param(1000, marks=pytest.mark.every_release)]


def race(
    start: Offline, folder: Path, num_operations: int = 1000, *, environ: Any = (), **options: Any
) -> Any:
    settings = {
        "KVCACHED_HOST_POOL": "48MiB",
        "KVCACHED_PAGE_BYTES": "2MiB",
        "KVCACHED_DEBUG": "1",
        **dict(environ),
    }
    variables = ours(folder, **settings)
    return report_of(start(variables, "event_race", num_operations=num_operations, **options))


def check(report: Any, num_operations: int = 1000) -> None:
    assert report["differs_after"] == ""
    assert report["num_compared"] == num_operations + 1
    assert min(report["events"].values()) > 0
    assert set(report["events"]) == {"BlockStored", "BlockRemoved", "AllBlocksCleared"}
    assert report["num_sleeps"] == report["done"]["sleep"]
    assert report["most_blocks"] > 20
    for operation in ("trim", "take", "reset", "sleep", "limit", "abort"):
        assert report["done"][operation] > 0


@pytest.mark.parametrize("num_operations", NUM_OPERATIONS)
def test_a_mirror_of_events_is_what_the_pool_is_after_each_operation(
    start_offline: Offline, tmp_path: Path, num_operations: int
) -> None:
    report = race(start_offline, tmp_path, num_operations, seed=0)
    check(report, num_operations)
    assert report["preemptions"] > 0


@pytest.mark.every_release
def test_so_it_is_where_weights_come_and_go(start_offline: Offline, tmp_path: Path) -> None:
    environ = {"KVCACHED_WEIGHTS": "yield", "KVCACHED_HOST_POOL": "128MiB"}
    check(race(start_offline, tmp_path, environ=environ, seed=1))


@pytest.mark.every_release
@pytest.mark.parametrize("loses", ["BlockRemoved", "AllBlocksCleared"])
def test_a_mirror_that_loses_events_is_seen_to_differ(
    start_offline: Offline, tmp_path: Path, loses: str
) -> None:
    assert race(start_offline, tmp_path, seed=0, loses=loses)["differs_after"]
