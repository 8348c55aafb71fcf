"""Who lies where: it fits, the pressure is near the least there can be, and moves pay."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

from hypothesis import assume, given
from hypothesis import strategies as st

from kvcached_gateway.policy.placement import DeviceRoom, PlacedModel, Placement, place
from kvcached_gateway.settings.config import PlacementSettings

SETTINGS = PlacementSettings()
CAPACITY = 800
ALL = tuple(DeviceRoom(name, CAPACITY) for name in ("g0", "g1", "g2"))
RATES = st.one_of(st.none(), st.floats(0, 1e6))


def models(
    most_bytes: int, rates: st.SearchStrategy[float | None]
) -> st.SearchStrategy[list[PlacedModel]]:
    sizes = st.integers(0, most_bytes)
    return st.lists(
        st.builds(
            PlacedModel,
            id=st.text("abcdefgh", min_size=1, max_size=3),
            weighted_rate=rates,
            weights_bytes=sizes,
            residue_bytes=st.integers(0, most_bytes // 8),
            floor_bytes=st.integers(0, most_bytes // 8),
            is_resident=st.booleans(),
            tensor_parallel=st.just(1),
            current=st.just(()),
            allowed=st.none(),
            is_movable=st.just(value=True),
            moved_at=st.none(),
            class_name=st.sampled_from([None, "chat"]),
        ),
        max_size=6,
        unique_by=lambda model: model.id,
    )


def placed(
    found: list[PlacedModel], devices: Sequence[DeviceRoom] = ALL, now: float = 0.0
) -> Placement:
    return place(found, devices, SETTINGS, now)


def taken(model: PlacedModel) -> int:
    return model.residue_bytes + (model.weights_bytes if model.is_resident else 0)


def does_fit(lying: list[PlacedModel], device: DeviceRoom) -> bool:
    """Whether all that must be there at once fits, and the largest of the others beside it."""
    wake = max((one.weights_bytes for one in lying if not one.is_resident), default=0)
    held = sum(taken(one) + one.floor_bytes for one in lying)
    return held + wake < device.capacity_bytes - device.other_bytes


def lying_on(found: list[PlacedModel], devices: dict[str, str], device: str) -> list[PlacedModel]:
    return [model for model in found if devices.get(model.id) == device]


def pressures(found: list[PlacedModel], devices: dict[str, str]) -> Iterator[float]:
    for device in ALL:
        lying = lying_on(found, devices, device.id)
        rate = sum(one.weighted_rate or 0.0 for one in lying)
        yield rate / max(device.capacity_bytes - sum(map(taken, lying)), 1)


def least_pressure(found: list[PlacedModel]) -> float:
    """Search every placement for the one whose highest ratio is least."""
    names = [device.id for device in ALL]
    return min(
        max(pressures(found, devices))
        for chosen in product(names, repeat=len(found))
        if (devices := dict(zip((model.id for model in found), chosen, strict=True))) is not None
        and all(does_fit(lying_on(found, devices, device.id), device) for device in ALL)
    )


@given(models(CAPACITY, RATES), st.integers(0, CAPACITY))
def test_it_never_breaks_fit_and_leaves_out_only_what_fits_nowhere(
    found: list[PlacedModel], other_bytes: int
) -> None:
    devices = [replace(ALL[0], other_bytes=other_bytes), *ALL[1:]]
    where = {name: ids[0] for name, ids in placed(found, devices).devices.items()}
    for device in devices:
        assert not (lying := lying_on(found, where, device.id)) or does_fit(lying, device)
    for model in found:
        if model.id not in where:
            for device in devices:
                assert not does_fit([*lying_on(found, where, device.id), model], device)


@given(models(CAPACITY // 8, st.floats(0, 1e6)))
def test_the_highest_pressure_stays_within_the_bound(found: list[PlacedModel]) -> None:
    """KVPR_max <= KVPR_opt * (1 + C / (S - w_k)), for `num` equal devices with room for all.

    Let k be the last model on the device of the highest ratio. It went where that was least, so it
    is at most the ratio of sums over all devices; the optimum is at least the mean of all, and at
    least k's own. Both together give C = (1 - 1 / num) * S, and for w_k what models take of a
    device on average and k once more on all others.
    """
    assume(found)
    result = placed(found)
    assert len(result.devices) == len(found)
    num = len(ALL)
    each = sum(map(taken, found)) / num + (1 - 1 / num) * max(map(taken, found))
    bound = 1 + (1 - 1 / num) * CAPACITY / (CAPACITY - each)
    assert max(result.pressures.values()) <= least_pressure(found) * bound * (1 + 1e-9)


def model(name: str, rate: float | None, weights: int = 100, **more: object) -> PlacedModel:
    return PlacedModel(name, rate, weights, **more)  # type: ignore[arg-type]


def test_nothing_goes_where_weights_that_yielded_would_never_fit_again() -> None:
    yielded = model("yielded", 1.0, CAPACITY - 100, is_resident=False, current=("g0",))
    for weights, is_placed in ((99, True), (100, False)):
        new = model("new", 1.0, weights, is_resident=True)
        result = placed([yielded, new], ALL[:1])
        assert ("new" in result.devices) is is_placed
    assert result.reasons["new"].endswith("1 B more would have to be free where most is")


def test_a_new_model_goes_where_the_pressure_will_be_least() -> None:
    found = [
        model("a", 60.0, current=("g0",)),
        model("b", 20.0, current=("g1",)),
        model("c", 30.0, current=("g2",)),
        model("new", 10.0),
    ]
    result = placed(found)
    assert result.devices["new"] == ("g1",)
    assert "the KV pressure ratio will be least there, 0.05" in result.reasons["new"]


def test_a_rate_that_is_not_known_is_that_of_its_class() -> None:
    found = [
        model("a", 90.0, current=("g0",), class_name="chat"),
        model("b", 1.0, current=("g1",), class_name="batch"),
        model("c", 1.0, current=("g2",), class_name="batch"),
        model("new", None, class_name="chat"),
        model("newer", 50.0),
    ]
    result = placed(found)
    assert {result.devices["new"], result.devices["newer"]} == {("g1",), ("g2",)}
    assert result.pressures[result.devices["new"][0]] == (90 + 1) / (CAPACITY - 200)


def test_weights_that_yield_take_no_room_for_good_but_the_largest_can_come_back() -> None:
    many = [model(f"m{n}", 1.0, 700, is_resident=False, residue_bytes=30) for n in range(3)]
    assert len(placed(many, ALL[:1]).devices) == 3
    many.append(model("one more", 1.0, 700, is_resident=False, residue_bytes=30))
    result = placed(many, ALL[:1])
    assert len(result.devices) == 3
    (left,) = {one.id for one in many} - set(result.devices)
    assert result.reasons[left] == ("gets no place: 21 B more would have to be free where most is")


def test_one_of_several_devices_gets_its_part_on_each() -> None:
    result = placed([model("wide", 90.0, 1200, tensor_parallel=2), model("a", 30.0, 100)])
    assert result.devices == {"wide": ("g0", "g1"), "a": ("g2",)}
    assert result.pressures == {"g0": 45 / 200, "g1": 45 / 200, "g2": 30 / 700}
    result = placed([model("wide", 90.0, 100, tensor_parallel=4)])
    assert result.reasons == {"wide": "gets no place: it needs 4 devices and may have 3"}


def test_a_model_keeps_to_the_devices_that_it_may_have() -> None:
    found = [model("a", 90.0, current=("g2",)), model("b", 10.0, allowed=frozenset({"g2"}))]
    assert placed(found).devices["b"] == ("g2",)


CROWDED = [
    model("a", 50.0, current=("g0",)),
    model("b", 40.0, current=("g0",)),
    model("c", 10.0, current=("g1",)),
]


def test_the_move_that_gains_most_is_made_when_it_gains_enough() -> None:
    result = place(CROWDED, ALL[:2], SETTINGS, 0.0)
    (move,) = result.moves
    assert (move.model, move.source, move.target) == ("b", ("g0",), ("g1",))
    assert result.pressures["g0"] == 90 / (CAPACITY - 200)
    assert result.devices["b"] == ("g0",), "it lies there until it has moved"
    assert "takes away 44%" in result.reasons["b"]


def test_a_move_that_gains_too_little_or_comes_too_soon_is_not_made() -> None:
    careful = PlacementSettings(move_gain=0.9)
    assert not place(CROWDED, ALL[:2], careful, 0.0).moves
    moved = [one._replace(moved_at=1_000.0) for one in CROWDED]
    assert not place(moved, ALL[:2], SETTINGS, 1_119.0).moves
    assert place(moved, ALL[:2], SETTINGS, 1_120.0).moves
    held = [one._replace(is_movable=False) for one in CROWDED]
    assert not place(held, ALL[:2], SETTINGS, 0.0).moves
    full = [ALL[0], replace(ALL[1], other_bytes=650)]
    assert not place(CROWDED, full, SETTINGS, 0.0).moves


def test_a_model_does_not_move_where_a_neighbour_could_not_wake_any_more() -> None:
    sleeps = model("d", 0.0, 600, is_resident=False, current=("g1",))
    assert place([*CROWDED, sleeps], ALL[:2], SETTINGS, 0.0).moves == ()
    smaller = sleeps._replace(weights_bytes=500)
    assert place([*CROWDED, smaller], ALL[:2], SETTINGS, 0.0).moves


PLACES = st.lists(st.integers(0, 2), min_size=6, max_size=6)


@given(models(CAPACITY // 8, st.floats(0, 1e6)), PLACES)
def test_at_steady_rates_each_move_lowers_the_pressure_and_they_end(
    found: list[PlacedModel], where: list[int]
) -> None:
    found = [
        one._replace(current=(ALL[index].id,))
        for one, index in zip(found, where[: len(found)], strict=True)
    ]
    for step in range(20):
        result = placed(found, now=step * 1e6)
        if not result.moves:
            break
        (move,) = result.moves
        found = [
            one._replace(current=move.target, moved_at=step * 1e6) if one.id == move.model else one
            for one in found
        ]
        after = placed(found, now=step * 1e6)
        source, target = move.source[0], move.target[0]
        higher = max(after.pressures[source], after.pressures[target])
        assert higher < (1 - SETTINGS.move_gain) * max(result.pressures.values()) * (1 + 1e-9)
        lying = [one for one in found if one.current == move.target]
        assert does_fit(lying, ALL[0])
    else:
        raise AssertionError("it moves for ever")
