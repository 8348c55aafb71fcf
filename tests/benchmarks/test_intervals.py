"""Intervals, and what may be said of a bar or of a difference."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parts.intervals import (
    BETTER,
    MET,
    MISSED,
    NOT_TOLD_APART,
    NUM_FOR_P99,
    WORSE,
    Interval,
    against_bar,
    apart,
    median_interval,
    percentile,
)

values = st.floats(0.01, 100.0)
intervals = st.lists(values, min_size=3, max_size=3).map(
    lambda three: Interval(sorted(three)[1], min(three), max(three))
)


@settings(max_examples=30, deadline=None)
@given(st.lists(values, min_size=1, max_size=30))
def test_an_interval_holds_its_median_and_stays_within_the_values(found: list[float]) -> None:
    made = median_interval(found)
    assert min(found) <= made.low <= made.value <= made.high <= max(found)
    assert made.value == pytest.approx(float(np.median(found)))
    assert median_interval(found) == made  # seeded


@settings(max_examples=20, deadline=None)
@given(st.lists(values, min_size=2, max_size=20), st.floats(0.1, 10.0))
def test_a_scale_scales_the_interval(found: list[float], scale: float) -> None:
    made, scaled = median_interval(found), median_interval([value * scale for value in found])
    assert [scaled.low, scaled.value, scaled.high] == pytest.approx(
        [made.low * scale, made.value * scale, made.high * scale]
    )


def test_about_95_of_a_hundred_intervals_hold_the_true_median() -> None:
    draws = np.random.default_rng(7).normal(5.0, 1.0, (200, 40))
    made = [median_interval(list(row)) for row in draws]
    held = sum(found.low <= 5.0 <= found.high for found in made)
    assert 180 <= held <= 200


def test_a_median_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        median_interval([])


@pytest.mark.parametrize("num", [1, NUM_FOR_P99 - 1, NUM_FOR_P99])
def test_a_99th_percentile_needs_a_thousand_values_and_a_median_one(num: int) -> None:
    found = [float(number) for number in range(num)]
    assert (percentile(found, 99) is None) == (num < NUM_FOR_P99)
    assert percentile(found, 50) is not None
    assert percentile([], 50) is None


@given(intervals, values)
def test_a_bar_is_met_where_the_whole_interval_is_on_its_side(found: Interval, bar: float) -> None:
    said = against_bar(found, "<=", bar)
    assert (said == MET) == (found.high <= bar)
    assert (said == MISSED) == (found.low > bar)
    turned = Interval(1 / found.value, 1 / found.high, 1 / found.low)
    if bar not in {found.low, found.high}:
        assert against_bar(turned, ">=", 1 / bar) == said or any(
            end == pytest.approx(bar) for end in (found.low, found.high)
        )


def test_a_relation_that_is_none_is_named() -> None:
    with pytest.raises(ValueError, match="'<' is not one of <=, >="):
        against_bar(Interval(1, 1, 1), "<", 1)


@given(intervals, st.lists(intervals, max_size=2), st.booleans())
def test_a_difference_is_told_where_it_is_outside_of_one_and_of_all_controls(
    ratio: Interval,
    controls: list[Interval],
    is_less_better: bool,  # noqa: FBT001  hypothesis gives it
) -> None:
    said = apart(ratio, controls, is_less_better=is_less_better)
    ends = [1.0, *(end for each in controls for end in (each.low, each.high))]
    is_apart = ratio.high < min(ends) or ratio.low > max(ends)
    assert (said == NOT_TOLD_APART) == (not is_apart)
    if is_apart:
        assert said == (BETTER if (ratio.high < 1) == is_less_better else WORSE)


def test_the_same_thing_twice_is_not_told_apart() -> None:
    control = Interval(1.03, 1.01, 1.05)
    assert apart(control, [control], is_less_better=True) == NOT_TOLD_APART
    assert apart(control, [], is_less_better=True) == WORSE


def test_what_is_nearer_to_one_than_the_control_is_not_told_apart() -> None:
    control = Interval(0.93, 0.90, 0.95)
    assert apart(Interval(0.975, 0.97, 0.98), [control], is_less_better=True) == NOT_TOLD_APART
    assert apart(Interval(0.85, 0.84, 0.86), [control], is_less_better=True) == BETTER


def test_a_ratio_is_turned_over_with_its_ends() -> None:
    assert Interval(0.5, 0.25, 2.0).turned() == Interval(2.0, 0.5, 4.0)
    assert Interval(0.5, 0.0, 1.0).turned() == Interval(2.0, 1.0, float("inf"))
