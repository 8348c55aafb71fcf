"""Who goes first: as many in time as there can be, and nobody dropped."""

import math
from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from kvcached_gateway.policy.admission import Order, Pace, Waiting, order

NOW = 100.0
TIMES = st.integers(0, 12)
GOALS = st.builds(
    Waiting,
    model=st.sampled_from("ab"),
    arrival=TIMES.map(lambda ago: NOW - ago),
    deadline=TIMES.map(lambda left: NOW + left),
    work=st.integers(0, 6).map(float),
    overdue_at=st.just(math.inf),
)
ANY = st.one_of(
    GOALS,
    st.builds(
        Waiting,
        model=st.just("c"),
        arrival=TIMES.map(lambda ago: NOW - ago),
        deadline=st.none() | TIMES.map(lambda left: NOW + left),
        work=st.integers(0, 6).map(float),
        overdue_at=TIMES.map(lambda step: NOW - 6 + step),
    ),
)
SPEEDS = st.sampled_from([0.5, 1.0, 2.0, math.inf])


@st.composite
def paced(draw: st.DrawFn) -> tuple[list[Waiting], dict[str, Pace]]:
    """Draw requests with goals, and how soon two models are at them; one of them may start."""
    waiting = draw(st.lists(GOALS, max_size=8))
    first = next((one for one in waiting if one.model == "a"), None)
    starting = Pace(draw(SPEEDS), float(draw(st.integers(0, 4))), first)
    return waiting, draw(st.sampled_from([{}, {"a": starting}, {"a": starting, "b": Pace(2.0)}]))


def needed_seconds(one: Waiting, paces: dict[str, Pace]) -> float:
    pace = paces.get(one.model, Pace())
    return one.work / pace.per_second + (pace.start_seconds if one is pace.first else 0.0)


def are_in_time(chosen: tuple[Waiting, ...], paces: dict[str, Pace]) -> bool:
    """Whether all make their goals in the order of these: if any order does it, that one does."""
    end = NOW
    for one in sorted(chosen, key=lambda one: one.deadline or 0):
        end += needed_seconds(one, paces)
        if end > (one.deadline or 0):
            return False
    return True


def most_in_time(waiting: list[Waiting], paces: dict[str, Pace]) -> int:
    return next(
        size
        for size in range(len(waiting), -1, -1)
        if any(are_in_time(chosen, paces) for chosen in combinations(waiting, size))
    )


@given(paced())
def test_no_order_lets_more_make_their_goals(drawn: tuple[list[Waiting], dict[str, Pace]]) -> None:
    waiting, paces = drawn
    found = order(waiting, NOW, paces)
    assert are_in_time(found.kept, paces)
    assert len(found.kept) == most_in_time(waiting, paces)


@given(st.lists(ANY, max_size=12))
def test_nobody_is_dropped_or_comes_twice(waiting: list[Waiting]) -> None:
    found = order(waiting, NOW)
    assert sorted(map(id, (*found.kept, *found.late))) == sorted(map(id, waiting))


@given(st.lists(ANY, max_size=12))
def test_the_overdue_go_first_and_those_without_a_goal_last_each_by_arrival(
    waiting: list[Waiting],
) -> None:
    found = order(waiting, NOW)
    kept = found.kept

    def part(one: Waiting) -> int:
        return 0 if one.overdue_at <= NOW else 1 if one.deadline is not None else 2

    assert [part(one) for one in kept] == sorted(part(one) for one in kept)
    for number in (0, 2):
        arrivals = [one.arrival for one in kept if part(one) == number]
        assert arrivals == sorted(arrivals)
    goals = [one.deadline for one in kept if part(one) == 1]
    assert goals == sorted(goals, key=lambda goal: goal or 0)
    assert [one.arrival for one in found.late] == sorted(one.arrival for one in found.late)
    assert all(one.overdue_at > NOW and one.deadline is not None for one in found.late)


@given(st.lists(st.tuples(TIMES, TIMES), max_size=12))
def test_without_a_goal_all_go_as_they_came(times: list[tuple[int, int]]) -> None:
    waiting = [Waiting("a", NOW - ago, None, float(seconds)) for ago, seconds in times]
    by_arrival = sorted(waiting, key=lambda one: one.arrival)
    assert order(waiting, NOW) == Order(tuple(by_arrival), (), NOW, {})


def test_of_equals_the_last_that_came_is_put_off() -> None:
    last, first = (Waiting("a", NOW - ago, NOW + 1, 1.0) for ago in (1, 2))
    assert order([last, first], NOW).late == (last,)
    assert order([first, last], NOW).late == (last,)


def test_a_start_counts_for_the_first_that_waits_for_it_alone() -> None:
    first, second = (Waiting("a", NOW + step, NOW + 10, 1.0) for step in (0.0, 0.1))
    assert order([first, second], NOW, {"a": Pace(1.0, 8.5, first)}).late == (first,)
    assert order([first, second], NOW, {"a": Pace(1.0, 8.0, first)}).late == ()


def test_each_place_has_its_reason() -> None:
    overdue = Waiting("a", NOW - 9, NOW, 1.0, overdue_at=NOW - 1)
    in_time = Waiting("a", NOW, NOW + 3, 1.0)
    late = Waiting("b", NOW, NOW + 3, 5.0)
    aimless = Waiting("a", NOW, None, 1.0)
    found = order([overdue, in_time, late, aimless], NOW, {"b": Pace(2.0)})
    assert found.reason(overdue) == "has waited 9.0 s, half of what it may: it goes by its arrival"
    assert found.reason(in_time) == "makes its goal in 3.00 s: it goes by that"
    assert "needs 2.50 s of the 3.00 s to its goal" in found.reason(late)
    assert found.reason(aimless).startswith("has no goal")
