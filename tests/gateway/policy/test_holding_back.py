"""Who holds back for whom: enough of those that have had their weights longest, or nobody."""

import math
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from kvcached_gateway.policy.turns import NOBODY, Holder, Waiter, choose

TURN = 10.0
PLACES = ("gpu", "other", "host memory")
WAITER = Waiter("waiter", 20.0, {"gpu": 10})
OLD = Holder("old", {"gpu": 10}, had_seconds=100.0)
HOLDERS = st.lists(
    st.builds(
        Holder,
        id=st.text("abcdefgh", min_size=1, max_size=3),
        given_bytes=st.dictionaries(st.sampled_from(PLACES), st.integers(0, 30)),
        had_seconds=st.sampled_from([0.0, 5.0, 10.0, 60.0, math.inf]),
        priority=st.integers(-1, 2),
        is_pinned=st.booleans(),
        kept_seconds=st.sampled_from([-1.0, 0.0, 5.0]),
        is_held=st.booleans(),
    ),
    max_size=8,
    unique_by=lambda one: one.id,
)
WAITERS = st.builds(
    Waiter,
    id=st.just("waiter"),
    waited_seconds=st.sampled_from([5.0, 10.0, 60.0]),
    missing_bytes=st.dictionaries(st.sampled_from(PLACES), st.integers(0, 60)),
    priority=st.integers(-1, 2),
)


def covers(those: Sequence[Holder], waiter: Waiter) -> bool:
    return all(
        sum(one.given_bytes.get(place, 0) for one in those) >= missing
        for place, missing in waiter.missing_bytes.items()
    )


def may(one: Holder, waiter: Waiter) -> bool:
    is_kept = one.kept_seconds > 0 and one.priority == waiter.priority
    is_above = one.priority > waiter.priority
    return not (one.is_pinned or is_above or is_kept or one.had_seconds < TURN)


@given(holders=HOLDERS, waiter=WAITERS)
def test_nobody_pinned_young_or_of_a_higher_priority_holds_back(
    holders: list[Holder], waiter: Waiter
) -> None:
    found = choose(waiter, holders, TURN)
    assert all(may(one, waiter) for one in holders if one.id in found.held)


@given(holders=HOLDERS, waiter=WAITERS)
def test_it_is_enough_with_nobody_needless_or_nobody_holds_back(
    holders: list[Holder], waiter: Waiter
) -> None:
    found = choose(waiter, holders, TURN)
    held = [one for one in holders if one.id in found.held]
    before = [one for one in holders if one.is_held and may(one, waiter)]
    assert bool(found.held) <= bool(found.reason)
    if covers([], waiter):
        assert held == before
        return
    can_be = covers([one for one in holders if may(one, waiter)], waiter)
    if not can_be or waiter.waited_seconds < TURN:
        assert not held
        return
    assert covers(held, waiter)
    assert all(one in held for one in before)
    for one in held:
        if one not in before:
            assert not covers([other for other in held if other is not one], waiter)


def test_who_has_had_its_weights_longest_holds_back_first() -> None:
    holders = [OLD._replace(id=name, had_seconds=had) for name, had in (("a", 20), ("b", 30))]
    assert choose(WAITER, holders, TURN).held == ("b",)
    assert choose(WAITER._replace(missing_bytes={"gpu": 15}), holders, TURN).held == ("b", "a")
    small = OLD._replace(id="small", given_bytes={"gpu": 4}, had_seconds=50.0)
    assert choose(WAITER, [small, *holders], TURN).held == ("b",)


def test_who_holds_back_goes_on_until_the_waiter_has_its_weights() -> None:
    idle = OLD._replace(had_seconds=math.inf, is_held=True)  # it has given some
    nothing_missing = WAITER._replace(missing_bytes={"gpu": 0})
    found = choose(nothing_missing, [idle], TURN)
    assert found.held == ("old",)
    assert found.reason == "'old' takes no new requests until 'waiter' has its weights"
    assert choose(nothing_missing, [OLD], TURN) == NOBODY


def test_more_hold_back_where_what_those_before_have_is_not_enough_any_more() -> None:
    held = OLD._replace(id="held", given_bytes={"gpu": 4}, is_held=True)
    assert choose(WAITER, [OLD, held], TURN).held == ("held", "old")


def test_it_is_said_why_nobody_holds_back_where_it_would_be_enough() -> None:
    young = OLD._replace(id="young", had_seconds=3.0)
    above = OLD._replace(id="above", priority=1)
    pinned = OLD._replace(id="pinned", is_pinned=True)
    kept = OLD._replace(id="kept", kept_seconds=2.0)
    found = choose(WAITER, [young, above, pinned, kept], TURN)
    assert found.held == ()
    assert found.reason == (
        "it waits for 10 B on gpu, and nobody holds back for it: "
        "'young' has had its weights for less than 10 s; 'above' has a higher priority; "
        "'pinned' is pinned; 'kept' keeps its weights for a while after they came back"
    )
    assert choose(WAITER._replace(priority=1), [kept], TURN).held == ("kept",)
    assert (
        choose(WAITER._replace(missing_bytes={"gpu": 41}), [young, above, pinned, kept], TURN)
        == NOBODY
    )


def test_what_is_said_names_all_and_what_is_missing() -> None:
    found = choose(WAITER._replace(missing_bytes={"gpu": 15}), [OLD, OLD._replace(id="b")], TURN)
    assert found.reason == (
        "'b', 'old' take no new requests until 'waiter' has its weights: "
        "it has waited more than 10 s for 15 B on gpu"
    )
