"""Three schedulers that all ask at once: what a schedule is, and that sharing loses nothing."""

import time
from pathlib import Path

import pytest
from helpers.benchmark_scripts import recorded_by
from multi_model.workloads import Request
from parts.virtual_time import clock
from ramp_schedulers import SCALES, Arrivals


def test_a_request_comes_when_it_is_due_and_is_measured_from_then_on() -> None:
    source = Arrivals([Request(0.0, 0, 4, 11), Request(2.0, 0, 4, 11)], 100.0)
    (first,) = source.due(101.0)
    assert list(source.due(101.0)) == []
    source.began(first, 101.5)
    source.began(first, 103.0)  # it was stopped, and is computed again
    source.ended(first, 111.5)
    assert (source.first_seconds, source.token_seconds) == ([1.5], [1.0])
    (second,) = source.due(102.0)
    assert second.prompt != first.prompt
    assert source.num_open == 1


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.every_release
def test_as_many_requests_are_in_time_on_one_pool_as_with_a_third_of_it_each(
    tmp_path: Path,
) -> None:
    (load,) = recorded_by("ramp_schedulers.py", tmp_path, "--peaks", "4")["loads"]
    assert min(load["split"]["preemptions"]) > 10  # memory is short
    assert load["shared"]["mapped_pages"] > 100  # and goes from one to the other
    for scale in map(str, SCALES):
        assert load["shared"]["in_time"][scale] >= load["split"]["in_time"][scale]


def test_the_time_of_a_process_is_its_own_until_a_script_says_otherwise() -> None:
    began = time.monotonic()
    assert time.monotonic is not clock.monotonic
    while time.monotonic() == began:
        time.sleep(0.001)
