"""How many pages were surplus for the whole of the last while."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcached_core.engine.lingering import Lingering


def make(idle_seconds: float) -> tuple[Lingering, list[float]]:
    now = [0.0]
    return Lingering(idle_seconds, lambda: now[0]), now


def test_what_was_surplus_all_the_time_is_due_and_not_before() -> None:
    lingering, now = make(2.0)
    lingering.note(5)
    now[0] = 1.9
    assert (lingering.num_due(), lingering.seconds_until_due()) == (0, pytest.approx(0.1))
    now[0] = 2.0
    assert (lingering.num_due(), lingering.seconds_until_due()) == (5, 0.0)


def test_what_somebody_needed_in_between_lingers_anew() -> None:
    lingering, now = make(2.0)
    lingering.note(5)
    now[0] = 1.0
    lingering.note(3)
    lingering.note(6)
    now[0] = 2.0
    assert (lingering.num_due(), lingering.seconds_until_due()) == (3, 1.0)
    now[0] = 3.0
    assert lingering.num_due() == 6


def test_pages_that_are_gone_take_nothing_from_the_others() -> None:
    lingering, now = make(2.0)
    lingering.note(5)
    now[0] = 2.0
    lingering.note(2)  # three of them went
    assert lingering.num_due() == 2


def test_a_moment_without_surplus_begins_anew() -> None:
    lingering, now = make(1.0)
    lingering.note(4)
    lingering.note(0)
    assert lingering.seconds_until_due() is None
    now[0] = 1.0
    lingering.note(4)
    assert (lingering.num_due(), lingering.seconds_until_due()) == (0, 1.0)
    lingering.restart()
    assert (lingering.num_due(), lingering.seconds_until_due()) == (0, None)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6))),
    st.integers(0, 5),
)
def test_it_is_the_minimum_over_the_window(steps: list[tuple[int, int]], idle: int) -> None:
    lingering, now = make(float(idle))
    history = [(-100.0, 0)]  # since when there were how many
    for pause, number in steps:
        now[0] += pause
        lingering.note(number)
        history.append((now[0], number))
        begin = now[0] - idle
        later = [value for since, value in history if since > begin]
        at_begin = [value for since, value in history if since <= begin]
        assert lingering.num_due() == min([at_begin[-1], *later])
