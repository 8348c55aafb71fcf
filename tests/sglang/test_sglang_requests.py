"""What we read of SGLang's scheduler, and the one flag of it that we clear."""

from types import SimpleNamespace
from typing import Any

import pytest

from kvcached_sglang.requests import is_busy, reopen

pytestmark = pytest.mark.sglang


def scheduler(**facts: Any) -> SimpleNamespace:
    running = SimpleNamespace(reqs=facts.pop("running", []), batch_is_full=True)
    defaults = {"waiting_queue": [], "chunked_req": None, "running_batch": running}
    return SimpleNamespace(**defaults | facts)


def test_requests_are_let_in_again_when_nothing_runs_or_memory_came() -> None:
    empty, running = scheduler(), scheduler(running=["request"])
    reopen(empty)
    reopen(running)
    assert not empty.running_batch.batch_is_full
    assert running.running_batch.batch_is_full  # a request that ends opens it
    reopen(running, has_more=True)
    assert not running.running_batch.batch_is_full


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({}, False),
        ({"running": ["request"]}, True),
        ({"waiting_queue": ["request"]}, True),
        ({"chunked_req": "request"}, True),
    ],
)
def test_memory_is_wanted_soon_where_requests_are(facts: dict[str, Any], *, expected: bool) -> None:
    assert is_busy(scheduler(**facts)) is expected
