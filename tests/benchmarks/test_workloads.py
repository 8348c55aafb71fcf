"""Schedules: how many requests, of whom, and when."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multi_model import workloads
from multi_model.errors import ModeError
from multi_model.settings import HOST, LENGTHS, make_workload
from multi_model.traces import TraceRequest, read_arena, read_azure


@given(peak=st.integers(1, 40), num_models=st.integers(1, 8))
def test_a_ramp_sends_peak_squared_requests_to_each_model(peak: int, num_models: int) -> None:
    ramp = workloads.ramp(peak, num_models=num_models)
    for model in range(num_models):
        assert len(ramp.of_model(model).requests) == peak**2
    times = [request.at_seconds for request in ramp.requests]
    assert times == sorted(times)


def test_a_ramp_climbs_and_falls_by_one_a_second() -> None:
    ramp = workloads.ramp(4, num_models=1)
    counts = Counter(int(request.at_seconds) for request in ramp.requests)
    assert [counts[second] for second in range(7)] == [1, 2, 3, 4, 3, 2, 1]


@given(peak=st.integers(2, 40))
def test_ramps_never_overlap_and_ramps_together_always_do(peak: int) -> None:
    ramp = workloads.ramp(peak, num_models=2)
    last = ramp.of_model(0).requests[-1].at_seconds
    assert ramp.of_model(1).requests[0].at_seconds > last
    together = workloads.ramp_together(peak, num_models=2)
    first, second = (
        [request.at_seconds for request in together.of_model(model).requests] for model in (0, 1)
    )
    assert first == second


def test_a_constant_load_is_even_for_all() -> None:
    steady = workloads.constant(2, 10, num_models=3)
    assert [len(steady.of_model(model).requests) for model in range(3)] == [20, 20, 20]
    assert steady.seconds < 10


def test_a_log_is_folded_by_rank_and_played_faster() -> None:
    names = ["a"] * 5 + ["b"] * 3 + ["c"] * 2 + ["d"]
    trace = [TraceRequest(index * 10.0, name, 1, 2) for index, name in enumerate(names)]
    folded = workloads.arena(trace, num_models=3, speed=5)
    assert [len(folded.of_model(model).requests) for model in range(3)] == [5 + 1, 3, 2]
    assert folded.seconds == 20.0
    assert workloads.arena(trace, num_models=3, speed=5, seconds=4).seconds < 4


def test_the_committed_logs_are_whole() -> None:
    arena, azure = read_arena(), read_azure()
    assert (len(arena), len({request.model for request in arena})) == (1500, 27)
    assert len(azure) == 19366
    assert azure[-1].at_seconds == pytest.approx(3502, abs=1)
    assert all(request.num_in > 0 and request.num_out > 0 for request in arena + azure)


def test_a_model_gets_a_share_by_what_it_needs() -> None:
    trace = [TraceRequest(0.0, "a", 100, 100), TraceRequest(0.0, "b", 100, 100)]
    trace.append(TraceRequest(1.0, "a", 100, 100))
    assert workloads.arena(trace, num_models=2, speed=1).shares() == pytest.approx([2 / 3, 1 / 3])


def test_a_workload_that_asks_nothing_is_refused() -> None:
    with pytest.raises(ModeError, match=r"'many:1' has no request in 0.1 s"):
        make_workload("many:1", 3, LENGTHS[HOST], 0.1)


@pytest.mark.parametrize("words", ["ramps:3", "ramp:many", "", "many:0", "many:nan"])
def test_an_unknown_workload_is_refused_by_name(words: str) -> None:
    with pytest.raises(ModeError, match=f"workload '{words}'"):
        make_workload(words, 3, LENGTHS[HOST], None)
