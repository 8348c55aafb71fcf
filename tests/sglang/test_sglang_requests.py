"""What we read of SGLang's scheduler, and the one flag of it that we clear."""

from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest

from kvcached_sglang.port import SglangPort
from kvcached_sglang.requests import answer_health_checks

pytestmark = pytest.mark.sglang


def port(**facts: Any) -> SglangPort:
    running = SimpleNamespace(reqs=facts.pop("running", []), batch_is_full=True)
    defaults = {"waiting_queue": [], "chunked_req": None, "running_batch": running}
    made = SglangPort(1024, lambda: 0)
    made.scheduler = SimpleNamespace(**defaults | facts)
    return made


def test_requests_are_let_in_again_when_nothing_runs_or_memory_came() -> None:
    empty, running = port(), port(running=["request"])
    for one in (empty, running):
        one.reopen(has_more=False)
    assert not empty.scheduler.running_batch.batch_is_full
    assert running.scheduler.running_batch.batch_is_full  # a request that ends opens it
    running.reopen(has_more=True)
    assert not running.scheduler.running_batch.batch_is_full


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
    assert port(**facts).is_busy() is expected


def test_batches_of_other_turns_run_and_are_pending_where_there_are_stages() -> None:
    some, none = SimpleNamespace(reqs=["request"]), SimpleNamespace(reqs=[])
    idle = {"last_batch": None, "mbs": [None, None], "running_mbs": [none, none]}
    assert not port(**idle).is_running()
    assert not port(**idle).is_pending()
    assert port(**idle | {"running_mbs": [none, some]}).is_running()
    prompt = port(**idle | {"mbs": [None, some]})  # on its way through the stages
    assert prompt.is_running()
    assert prompt.is_pending()
    prompt.reopen(has_more=False)
    assert not prompt.scheduler.running_batch.batch_is_full  # of its own turn none runs


class Loop:
    """A scheduler's queue, and the answers to health checks."""

    def __init__(self, *rids: str, asleep: bool) -> None:
        self.waiting_queue = [SimpleNamespace(rid=rid, http_worker_ipc=rid) for rid in rids]
        self.weight_updater = SimpleNamespace(offload_tags={"kv_cache"} if asleep else set())
        self.return_health_check_ipcs: deque[str] = deque()
        self.answered: list[str] = []

    def maybe_send_health_check_signal(self) -> None:
        if self.return_health_check_ipcs:
            self.answered.append(self.return_health_check_ipcs.popleft())


@pytest.mark.parametrize("asleep", [False, True])
def test_a_health_check_does_not_wait_for_a_wake(*, asleep: bool) -> None:
    from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX

    check = f"{HEALTH_CHECK_RID_PREFIX}_1"
    loop = Loop("request", check, asleep=asleep)
    answer_health_checks(loop)
    assert loop.answered == ([check] if asleep else [])
    waiting = [one.rid for one in loop.waiting_queue]
    assert waiting == (["request"] if asleep else ["request", check])


def test_what_left_the_prefix_cache_is_told_at_once() -> None:
    told: list[str] = []
    publisher = SimpleNamespace(publish_kv_events=lambda: told.append("events"))
    port(kv_events_publisher=publisher).publish()
    port().publish()  # where nobody listens
    SglangPort(1024, lambda: 0).publish()
    assert told == ["events"]
