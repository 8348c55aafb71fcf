"""Who goes first: as many in time as there can be, and nobody dropped."""

import math
from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from kvcached_gateway.policy.admission import Order, Waiting, order

NOW = 100.0
TIMES = st.integers(0, 12)
GOALS = st.builds(
    Waiting,
    key=st.uuids(),
    arrival=TIMES.map(lambda ago: NOW - ago),
    deadline=TIMES.map(lambda left: NOW + left),
    seconds=st.integers(0, 6).map(float),
    model=st.sampled_from("ab"),
    is_first_of_start=st.booleans(),
    start_seconds=st.integers(0, 4).map(float),
    overdue_at=st.just(math.inf),
)
ANY = st.one_of(
    GOALS,
    st.builds(
        Waiting,
        key=st.uuids(),
        arrival=TIMES.map(lambda ago: NOW - ago),
        deadline=st.none() | TIMES.map(lambda left: NOW + left),
        seconds=st.integers(0, 6).map(float),
        model=st.just("c"),
        is_first_of_start=st.just(value=False),
        start_seconds=st.just(0.0),
        overdue_at=TIMES.map(lambda step: NOW - 6 + step),
    ),
)


def are_in_time(chosen: tuple[Waiting, ...]) -> bool:
    """Whether all make their goals in the order of these: if any order does it, that one does."""
    end = NOW
    for one in sorted(chosen, key=lambda one: one.deadline or 0):
        end += one.needed_seconds
        if end > (one.deadline or 0):
            return False
    return True


def most_in_time(waiting: list[Waiting]) -> int:
    return next(
        size
        for size in range(len(waiting), -1, -1)
        if any(are_in_time(chosen) for chosen in combinations(waiting, size))
    )


@given(st.lists(GOALS, max_size=8))
def test_no_order_lets_more_make_their_goals(waiting: list[Waiting]) -> None:
    found = order(waiting, NOW)
    kept = tuple(one for one in waiting if one.key in found.kept)
    assert are_in_time(kept)
    assert len(kept) == most_in_time(waiting)


@given(st.lists(ANY, max_size=12))
def test_nobody_is_dropped_or_comes_twice(waiting: list[Waiting]) -> None:
    found = order(waiting, NOW)
    assert sorted((*found.kept, *found.late)) == sorted(one.key for one in waiting)


@given(st.lists(ANY, max_size=12))
def test_the_overdue_go_first_and_those_without_a_goal_last_each_by_arrival(
    waiting: list[Waiting],
) -> None:
    found = order(waiting, NOW)
    by_key = {one.key: one for one in waiting}
    kept = [by_key[key] for key in found.kept]

    def part(one: Waiting) -> int:
        return 0 if one.overdue_at <= NOW else 1 if one.deadline is not None else 2

    assert [part(one) for one in kept] == sorted(part(one) for one in kept)
    for number in (0, 2):
        arrivals = [one.arrival for one in kept if part(one) == number]
        assert arrivals == sorted(arrivals)
    goals = [one.deadline for one in kept if part(one) == 1]
    assert goals == sorted(goals, key=lambda goal: goal or 0)
    late = [by_key[key] for key in found.late]
    assert [one.arrival for one in late] == sorted(one.arrival for one in late)
    assert all(one.overdue_at > NOW and one.deadline is not None for one in late)


@given(st.lists(st.tuples(TIMES, TIMES), max_size=12))
def test_without_a_goal_all_go_as_they_came(times: list[tuple[int, int]]) -> None:
    waiting = [
        Waiting(index, NOW - ago, None, float(seconds), "a")
        for index, (ago, seconds) in enumerate(times)
    ]
    by_arrival = sorted(waiting, key=lambda one: one.arrival)
    assert order(waiting, NOW) == Order(
        tuple(one.key for one in by_arrival), (), NOW, {one.key: one for one in waiting}
    )


def test_of_equals_the_last_that_came_is_put_off() -> None:
    waiting = [Waiting(name, NOW - ago, NOW + 1, 1.0, "a") for name, ago in (("b", 1), ("a", 2))]
    assert order(waiting, NOW).late == ("b",)


def test_each_place_has_its_reason() -> None:
    found = order(
        [
            Waiting("overdue", NOW - 9, NOW, 1.0, "a", overdue_at=NOW - 1),
            Waiting("in time", NOW, NOW + 3, 1.0, "a"),
            Waiting("late", NOW, NOW + 3, 2.5, "a"),
            Waiting("aimless", NOW, None, 1.0, "a"),
        ],
        NOW,
    )
    assert (
        found.reason("overdue") == "has waited 9.0 s, half of what it may: it goes by its arrival"
    )
    assert found.reason("in time") == "makes its goal in 3.00 s: it goes by that"
    assert "needs 2.50 s of the 3.00 s to its goal" in found.reason("late")
    assert found.reason("aimless").startswith("has no goal")
