"""Who is stopped: enough of the cheapest, or nobody."""

from itertools import chain, combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcached_gateway.policy.eviction import Aging, Candidate, Eviction, choose
from kvcached_gateway.settings.config import MemorySettings

NOW = 10_000.0
SETTINGS = MemorySettings()
PLACES = ("gpu", "host")
IDLE = Candidate(
    "idle",
    {"gpu": 10, "host": 20},
    frequency=1.0,
    start_seconds=30.0,
    is_busy=False,
    is_pinned=False,
    idle_seconds=1e3,
    warm_seconds=1e3,
)
CANDIDATES = st.lists(
    st.builds(
        Candidate,
        id=st.text("abcdefgh", min_size=1, max_size=3),
        freed_bytes=st.dictionaries(st.sampled_from(PLACES), st.integers(0, 30)),
        frequency=st.floats(0, 10),
        start_seconds=st.floats(1, 100),
        is_busy=st.booleans(),
        is_pinned=st.booleans(),
        idle_seconds=st.sampled_from([0.0, 25.0, 60.0, 1e3]),
        warm_seconds=st.sampled_from([5.0, 25.0, 60.0, 1e3]),
        begun_seconds=st.sampled_from([30.0, 60.0, 1e3]),
        class_weight=st.sampled_from([0.5, 1.0, 4.0]),
    ),
    max_size=8,
    unique_by=lambda one: one.id,
)
NEEDED = st.dictionaries(st.sampled_from(PLACES), st.integers(0, 60))


def chosen(
    candidates: list[Candidate],
    needed: dict[str, int],
    state: Aging = Aging(),  # noqa: B008  frozen
    *,
    is_for_request: bool = True,
) -> Eviction:
    return choose(candidates, needed, state, SETTINGS, NOW, is_for_request=is_for_request)


def covers(models: list[Candidate], needed: dict[str, int]) -> bool:
    return all(
        sum(one.freed_bytes.get(place, 0) for one in models) >= num for place, num in needed.items()
    )


@given(candidates=CANDIDATES, needed=NEEDED, is_for_request=st.booleans())
def test_it_covers_what_is_missing_with_nobody_needless_or_stops_nobody(
    *, candidates: list[Candidate], needed: dict[str, int], is_for_request: bool
) -> None:
    found = chosen(candidates, needed, is_for_request=is_for_request)
    free = [one for one in candidates if one.id not in found.stays]
    victims = [one for one in free if one.id in found.victims]
    assert len(victims) == len(found.victims)
    sets = chain.from_iterable(combinations(free, size) for size in range(len(free) + 1))
    can_be_covered = any(covers(list(some), needed) for some in sets)
    if not can_be_covered or covers([], needed):
        assert not victims
        return
    assert covers(victims, needed)
    for one in victims:
        assert not covers([other for other in victims if other is not one], needed)


@given(candidates=CANDIDATES, needed=NEEDED, is_for_request=st.booleans())
def test_nobody_busy_pinned_or_young_is_stopped(
    *, candidates: list[Candidate], needed: dict[str, int], is_for_request: bool
) -> None:
    found = chosen(candidates, needed, is_for_request=is_for_request)
    least = 20 if is_for_request else 45
    for one in candidates:
        is_young = one.warm_seconds < 20 or one.begun_seconds < 60
        stays = one.is_busy or one.is_pinned or is_young or one.idle_seconds < least
        assert stays == (one.id in found.stays)
        assert not (stays and one.id in found.victims)


def test_the_cheapest_to_start_again_for_each_byte_goes_first() -> None:
    often = IDLE._replace(id="often", frequency=5.0)
    slow = IDLE._replace(id="slow", start_seconds=300.0)
    large = IDLE._replace(id="large", freed_bytes={"gpu": 40}, frequency=2.0)
    dear = IDLE._replace(id="dear", class_weight=9.0)
    rest = [often, slow, large, dear, IDLE]
    gone = []
    while rest:
        (victim,) = chosen(rest, {"gpu": 1}).victims
        gone.append(victim)
        rest = [one for one in rest if one.id != victim]
    assert gone == ["large", "idle", "often", "dear", "slow"]


def test_the_largest_of_the_needless_is_let_go() -> None:
    small = [IDLE._replace(id=name, freed_bytes={"gpu": 10}, frequency=0.1) for name in "ab"]
    large = IDLE._replace(id="large", freed_bytes={"gpu": 100}, frequency=20.0)
    assert chosen([*small, large], {"gpu": 20}).victims == ("a", "b")
    assert chosen([*small, large], {"gpu": 100}).victims == ("large",)


def test_what_was_asked_for_often_long_ago_goes_before_what_was_asked_for_lately() -> None:
    once = IDLE._replace(id="once", frequency=5.0, idle_seconds=2_000.0)
    lately = IDLE._replace(id="lately", frequency=4.0, idle_seconds=500.0)
    assert chosen([once, lately], {"gpu": 1}).victims == ("lately",)
    between = Aging(levels=((NOW - 1_000, 8.0),))
    assert chosen([once, lately], {"gpu": 1}, between).victims == ("once",)


def test_the_level_never_falls_and_only_the_last_ones_are_kept() -> None:
    state = Aging()
    for step in range(200):
        found = choose(
            [IDLE._replace(frequency=float(step % 7))],
            {"gpu": 1},
            state,
            SETTINGS,
            NOW + step,
            is_for_request=True,
        )
        assert found.state.level_at(NOW + step) >= state.level_at(NOW + step)
        state = found.state
    assert len(state.levels) == 64
    assert [moment for moment, _ in state.levels] == [NOW + step for step in range(136, 200)]


def test_two_early_ends_double_how_long_a_model_stays_and_a_late_one_undoes_it() -> None:
    young = IDLE._replace(warm_seconds=100.0)
    state = Aging()
    stays = []
    for _ in range(12):
        state = state.after([young], {"idle": 1.0}, NOW)
        stays.append(state.min_warm_seconds("idle", 20.0))
    assert stays == [20, 40, 40, 80, 80, 160, 160, 320, 320, 600, 600, 600]
    assert state.min_warm_seconds("another", 20.0) == 20
    assert "at least 600 s" in chosen([young], {"gpu": 1}, state).stays["idle"]
    assert state.after([IDLE], {"idle": 1.0}, NOW).min_warm_seconds("idle", 20.0) == 20


def test_a_refusal_leaves_the_state_alone_and_names_who_stays() -> None:
    state = Aging(levels=((1.0, 2.0),))
    found = chosen([IDLE._replace(is_busy=True), IDLE._replace(id="b")], {"gpu": 11}, state)
    assert found.state is state
    assert found.reason == (
        "nobody is stopped; 11 B are missing on gpu, and whoever may go gives 10 B; 'idle' is busy"
    )


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"is_busy": True}, "is busy"),
        ({"is_pinned": True}, "is pinned"),
        ({"warm_seconds": 3.0}, "is young: up for 3 s of at least 20 s"),
        ({"begun_seconds": 59.0}, "began to start 59 s ago, less than 60 s"),
        ({"idle_seconds": 30.0}, "was asked 30 s ago, less than 45 s"),
    ],
)
def test_who_stays_says_why(change: dict[str, object], why: str) -> None:
    candidate = IDLE._replace(**change)  # type: ignore[arg-type]
    assert chosen([candidate], {"gpu": 1}, is_for_request=False).stays == {"idle": why}


def test_who_goes_says_why() -> None:
    assert chosen([IDLE], {"gpu": 8}).reason == (
        "stops 'idle', the cheapest to start again for each byte: 10 B for the 8 B missing on gpu"
    )
