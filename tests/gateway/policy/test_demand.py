"""Rates and means from counters."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcached_gateway.policy.demand import DecayedCount, Demand, Mean, Rate, weighted_rate


def test_a_steady_counter_has_its_rate_however_often_it_is_read() -> None:
    rate = Rate()
    assert rate.per_second is None
    now = 0.0
    for step in (0.5, 3.0, 0.1, 60.0, 7.0):
        rate.counted(now * 20, now)
        now += step
    assert rate.per_second == pytest.approx(20.0)


def test_what_is_older_than_the_window_counts_little() -> None:
    rate = Rate(window_seconds=60)
    rate.counted(0, 0)
    rate.counted(6_000, 60)
    rate.counted(6_000, 120)
    assert rate.per_second == pytest.approx(100 * 0.269, rel=1e-2)
    for now in range(180, 900, 60):
        rate.counted(6_000, now)
    assert rate.per_second == pytest.approx(0, abs=1e-3)


@given(st.lists(st.tuples(st.integers(0, 1_000), st.floats(0, 10)), max_size=20))
def test_a_counter_that_begins_again_gives_no_rate_below_nothing(
    readings: list[tuple[int, float]],
) -> None:
    rate, now = Rate(), 0.0
    for total, step in readings:
        now += step
        rate.counted(total, now)
        assert rate.per_second is None or rate.per_second >= 0


def test_two_readings_at_about_the_same_time_are_one() -> None:
    rate = Rate()
    rate.counted(0, 10)
    rate.counted(100, 10 + 1e-310)
    rate.counted(100, 10.0005)
    assert rate.per_second is None
    rate.counted(100, 20)
    assert rate.per_second == 10


def test_a_restart_counts_from_nothing() -> None:
    rate = Rate()
    rate.counted(1_000, 0)
    rate.counted(50, 10)
    assert rate.per_second == 5


def test_half_of_a_count_is_forgotten_in_ten_minutes() -> None:
    count = DecayedCount()
    for _ in range(8):
        count.add(100.0)
    assert count.at(100.0) == 8
    assert count.at(700.0) == pytest.approx(4)
    count.add(1_300.0)
    assert count.at(1_300.0) == pytest.approx(3)


def test_a_mean_goes_to_what_is_measured_now() -> None:
    mean = Mean()
    mean.measured(10)
    assert mean.value == 10
    mean.measured(20)
    assert mean.value == 12
    for _ in range(60):
        mean.measured(20)
    assert mean.value == pytest.approx(20, rel=1e-3)


def test_tokens_for_each_byte_are_measured_and_stay_over_a_restart() -> None:
    demand = Demand()
    assert demand.prompt_tokens(4_000) == 1_000
    demand.counted(0, 500, 0.0)
    demand.arrived(0.5)
    assert demand.prompt_tokens(4_000) == 1_000, "it waits, and no token of it was counted"
    demand.sent(1_000)
    demand.counted(0, 1_000, 1.0)
    assert demand.prompt_tokens(4_000) == 2_000
    demand.counted(0, 0, 2.0)
    assert demand.prompt_tokens(4_000) == 2_000
    demand.sent(1_000)
    demand.counted(0, 100, 3.0)
    assert demand.prompt_tokens(4_000) == 400


def test_how_fast_prompts_are_read_is_measured_in_bytes() -> None:
    demand = Demand()
    assert demand.reading_seconds(10**6) == 0
    demand.read(8_000, 0.5)
    assert demand.reading_seconds(32_000) == 2
    demand.read(8_000, 0.0)
    assert demand.reading_seconds(32_000) == 2


def test_arrivals_are_counted_as_they_come() -> None:
    demand = Demand()
    demand.counted(0, 0, 0.0)
    for second in range(10):
        demand.arrived(float(second))
    demand.counted(500, 100, 10.0)
    assert demand.arrivals.per_second == 1
    assert demand.tokens.per_second == 50
    assert demand.frequency.at(9.0) == pytest.approx(10, rel=0.01)


def test_a_model_presses_by_rate_token_size_and_goal() -> None:
    assert weighted_rate(100.0, 131_072, 0.05) == 100 * 131_072 / 0.05
    assert weighted_rate(100.0, 131_072, None) == 100 * 131_072 / 0.1
    assert weighted_rate(None, 131_072, 0.05) is None
