"""A start that fails in its caller's process leaves nothing while that process goes on."""

from pathlib import Path

import pytest
from helpers.engines import Offline, report_of, yielding

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PLACES = [
    "vllm.v1.executor.abstract.Executor.determine_available_memory",  # weights are loaded
    "vllm.v1.engine.core.StructuredOutputManager",  # the cache is placed, the copy begins
    "vllm.v1.engine.core.get_hash_fn_by_name",  # there is a scheduler, too
]


@pytest.mark.parametrize(
    "places", [PLACES[-1:], pytest.param(PLACES, marks=pytest.mark.every_release)]
)
def test_a_failed_start_leaves_no_row_and_no_memory(
    start_offline: Offline, tmp_path: Path, places: list[str]
) -> None:
    """In a process of its own: what is forked has frozen objects, and no collector frees those."""
    environ = yielding(tmp_path, KVCACHED_FLOOR="32MiB")
    started = start_offline(environ, "offline_failed", cold=True, places=places)
    assert report_of(started) == {"failed": places}
