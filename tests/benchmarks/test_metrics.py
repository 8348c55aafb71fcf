"""Figures of a replay, against records made by hand."""

import pytest
from multi_model import metrics
from multi_model.client import Record
from multi_model.metrics import Level


def record(ttft: float, tpot: float, *, model: int = 0, error: str = "") -> Record:
    return Record(
        model,
        due_seconds=0.0,
        num_in=8,
        num_out=11,
        num_tokens=0 if error else 11,
        ttft_seconds=None if error else ttft,
        last_seconds=None if error else ttft + 10 * tpot,
        error=error,
    )


def test_time_per_token_leaves_the_first_out() -> None:
    assert record(0.5, 0.02).tpot_seconds == pytest.approx(0.02)


def test_failed_requests_count_as_misses() -> None:
    records = [record(0.1, 0.01), record(0.1, 0.01, error="lost")]
    assert metrics.attainment(records, [Level(0.1, 0.01)], [2]) == [0.5]


def test_both_times_have_to_be_within_the_scale_of_the_requests_own_model() -> None:
    levels = [Level(0.1, 0.01), Level(1.0, 0.01)]
    late, slow = record(0.25, 0.01), record(0.1, 0.025)
    assert not metrics.is_within(late, levels[0], 2)
    assert not metrics.is_within(slow, levels[0], 2)
    assert metrics.is_within(late, levels[0], 3)
    assert metrics.attainment([record(0.9, 0.01, model=1)], levels, [1]) == [1.0]


def test_the_level_is_the_95th_percentile_alone() -> None:
    level = metrics.level([record(number / 100, 0.01) for number in range(1, 101)])
    assert level.ttft_seconds == pytest.approx(0.9505)
    assert level.tpot_seconds == pytest.approx(0.01)


def test_a_model_that_nobody_asks_needs_no_level_and_one_that_is_asked_does() -> None:
    alone = [record(0.1, 0.01), record(0.2, 0.01, model=2)]
    found = {"alone": alone, "static": alone}
    made = metrics.levels(alone, found, 4)
    assert made is not None
    assert [each.ttft_seconds for each in made] == [0.1, float("inf"), 0.2, float("inf")]
    assert metrics.levels(alone, found | {"elastic": [record(0.1, 0.01, model=1)]}, 4) is None
    lost = record(0.1, 0.01, model=1, error="lost")
    assert metrics.levels([*alone, lost], found | {"alone": [*alone, lost]}, 4) is None
    assert metrics.levels([], {"static": alone}, 4) is None


def test_a_level_of_answers_of_one_token_bounds_the_first_token_alone() -> None:
    one = Record(0, 0.0, 8, 1, num_tokens=1, ttft_seconds=0.1, last_seconds=0.1)
    made = metrics.level([one])
    assert made == Level(0.1, float("inf"))
    assert metrics.attainment([one], [made], [1]) == [1.0]


def test_the_tightest_scale_is_the_first_with_99_percent() -> None:
    assert metrics.tightest_scale([0.5, 0.989, 0.99, 1.0], [1, 2, 3, 4]) == 3
    assert metrics.tightest_scale([0.5], [1]) is None


def test_a_summary_counts_what_failed_and_what_came() -> None:
    found = metrics.summarize([record(0.1, 0.01), record(0, 0, error="lost")], [Level(0.1, 0.01)])
    assert (found["num_requests"], found["num_failed"], found["errors"]) == (2, 1, ["lost"])
    assert found["goodput_per_second"] == pytest.approx(1 / 0.2)
