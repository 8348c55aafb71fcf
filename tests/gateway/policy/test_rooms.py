"""The least pressed devices are found as if each had been asked, after whatever was added."""

import math

from hypothesis import given
from hypothesis import strategies as st

from kvcached_gateway.policy.load import Load, Share
from kvcached_gateway.policy.rooms import Rooms

NAMES = tuple(f"g{number}" for number in range(12))
RATES = st.sampled_from([0.0, 1.0, 2.5]) | st.floats(0, 1e6)
SHARES = st.builds(Share, RATES, st.integers(0, 200), st.integers(0, 200), st.integers(0, 20))
CAPACITIES = st.lists(
    st.sampled_from([0, 500, 800]) | st.integers(-10, 1_000), min_size=1, max_size=len(NAMES)
)
ALLOWED = st.none() | st.frozensets(st.sampled_from(NAMES))


def asked_each(
    loads: dict[str, Load], share: Share, num: int, allowed: frozenset[str] | None
) -> list[str]:
    fitting = [
        load
        for load in loads.values()
        if load.spare_bytes(share) > 0 and (allowed is None or load.id in allowed)
    ]
    fitting.sort(key=lambda one: (one.pressure(plus=share), -one.free_bytes, one.id))
    return [load.id for load in fitting[:num]] if len(fitting) >= num else []


@given(CAPACITIES, st.lists(st.tuples(SHARES, st.integers(1, 3), ALLOWED), max_size=25))
def test_the_best_are_those_that_a_look_at_each_device_finds(
    capacities: list[int], shares: list[tuple[Share, int, frozenset[str] | None]]
) -> None:
    loads = {name: Load(name, capacity) for name, capacity in zip(NAMES, capacities, strict=False)}
    rooms = Rooms(loads)
    for share, num, allowed in shares:
        expected = asked_each(loads, share, num, allowed)
        found = rooms.best(share, num, allowed)
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert loads[ours].spare_bytes(share) > 0
            assert math.isclose(
                loads[ours].pressure(plus=share), loads[theirs].pressure(plus=share)
            )
        assert allowed is None or allowed.issuperset(found)
        assert len(set(found)) == len(found)
        rooms.add(found, share)


def test_of_equal_devices_the_first_one_is_taken_and_of_idle_ones_the_one_with_most_room() -> None:
    share = Share(1.0, 10, 0, 0)
    rooms = Rooms({name: Load(name, 500) for name in NAMES})
    assert rooms.best(share, 2, None) == ("g0", "g1")
    idle = {"small": Load("small", 500), "large": Load("large", 520), "huge": Load("huge", 900)}
    assert Rooms(idle).best(Share(0.0, 10, 0, 0), 3, None) == ("huge", "large", "small")


def test_one_with_more_room_may_be_better_than_a_less_pressed_one_of_its_group() -> None:
    loads = {"calm": Load("calm", 1_060), "large": Load("large", 1_150)}
    rooms = Rooms(loads)
    rooms.add(["large"], Share(1.15, 0, 0, 0))
    assert loads["calm"].pressure() < loads["large"].pressure()
    assert rooms.best(Share(100.0, 0, 0, 0), 1, None) == ("large",)
    assert rooms.best(Share(0.1, 0, 0, 0), 1, None) == ("calm",)
