"""What a schedule may take at most, as it is read of SGLang's scheduler."""

from types import SimpleNamespace
from typing import Any

import pytest
from helpers.sglang_elastic import hooked
from sglang.srt.managers import schedule_batch
from sglang.srt.managers.schedule_batch import ScheduleBatch

from kvcached_sglang.demand import demand_of
from kvcached_sglang.hooks import retract_decode

pytestmark = pytest.mark.sglang


def request(num_tokens: int, num_answer_tokens: int) -> Any:
    return SimpleNamespace(
        origin_input_ids=[1] * num_tokens,
        output_ids=[],
        sampling_params=SimpleNamespace(max_new_tokens=num_answer_tokens),
    )


def test_the_demand_is_what_runs_and_as_many_prompts_as_a_batch_computes() -> None:
    scheduler = SimpleNamespace(
        running_batch=SimpleNamespace(reqs=[1, 2]),
        last_batch=SimpleNamespace(reqs=[3]),
        chunked_req=request(10, 2),
        waiting_queue=[request(8, 4), request(20, 10_000), request(5, 5)],
    )
    demand = demand_of(scheduler, 4, prefill_tokens=30)
    assert demand.num_running == 3 + (3 + 1)
    assert demand.num_queued == (3 + 1) + (-(-(20 + 4096) // 4) + 1)
    assert demand.num_least == 3 + 1


def test_each_beam_of_a_request_takes_a_token_in_each_step() -> None:
    beams = SimpleNamespace(beam_group=SimpleNamespace(num_member_rows=3))
    scheduler = SimpleNamespace(
        running_batch=SimpleNamespace(reqs=[SimpleNamespace(beam_group=None), beams]),
        last_batch=None,
        chunked_req=None,
        waiting_queue=[],
    )
    assert demand_of(scheduler, 1, prefill_tokens=30).num_running == 2 + 3


class Batch(ScheduleBatch):  # type: ignore[misc]  # SGLang has no types here
    """A batch as far as it gives requests up, where there is no memory for a step."""

    def __init__(self, *requests: Any) -> None:
        self.reqs = list(requests)
        self.released: list[Any] = []

    def _get_decode_retraction_order(self, requests: list[Any]) -> list[int]:
        return list(range(len(requests)))

    def check_decode_mem(self, selected_indices: list[int] | None = None) -> bool:
        return False

    def release_req(self, idx: int, *_: Any, **__: Any) -> bool:
        self.released.append(self.reqs[idx])
        return True

    def filter_batch(self, *, keep_indices: list[int]) -> None:
        self.reqs = [self.reqs[index] for index in keep_indices]


@pytest.mark.skipif(not hasattr(schedule_batch, "free_member_rows"), reason="without beams")
@pytest.mark.parametrize("has_beams", [False, True])
def test_the_last_request_waits_and_one_with_beams_ends_as_sglang_ends_it(
    monkeypatch: pytest.MonkeyPatch, *, has_beams: bool
) -> None:
    freed: list[Any] = []
    monkeypatch.setattr(schedule_batch, "free_member_rows", lambda group, *_: freed.append(group))
    monkeypatch.setattr(
        schedule_batch.NewTokenRatioTracker, "estimate_new_token_ratio_after_retract", len
    )
    group = SimpleNamespace(num_member_rows=3) if has_beams else None
    last = request(4, 4)
    last.beam_group, last.rid = group, "last"
    batch = Batch(last)
    batch.req_to_token_pool = batch.token_to_kv_pool_allocator = None
    engine: Any = SimpleNamespace(pay=lambda: None)
    with hooked(engine, (ScheduleBatch, "retract_decode", retract_decode)):
        retracted, _, aborted = batch.retract_decode()
    assert (retracted, aborted) == (([], [last]) if has_beams else ([last], []))
    assert batch.released == [last]
    assert batch.reqs == []
    assert freed == ([group] if has_beams else [])
