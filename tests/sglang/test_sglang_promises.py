"""What a schedule may take at most, as it is read of SGLang's scheduler."""

from types import SimpleNamespace
from typing import Any

import pytest

from kvcached_sglang.demand import demand_of

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
