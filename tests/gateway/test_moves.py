"""Where models start, and how one moves: its source serves until the target has answered."""

from pathlib import Path
from typing import Any

from helpers.gateway_fleet import Takes, World, simulated_in

from kvcached_gateway.control.machine import MachineView
from kvcached_gateway.lease import Ending
from kvcached_gateway.state import State

TWO = {"one": 80.0, "two": 80.0}
SMALL = Takes(process=1.0, residue=2.0, weights=10.0)


def two_devices(folder: Path, *names: str, **more: Any) -> World:
    return World(folder, dict.fromkeys(names, SMALL), devices=TWO, **more)


async def press(world: World, **rates: float) -> None:
    """Say how hard models press on their devices, which engines' counters would."""
    world.controller.demands.weighted_rate = (  # type: ignore[method-assign]
        lambda model, _sizes, _classes: rates.get(model.id, 0.0)
    )


async def moving(folder: Path, **more: Any) -> World:
    """Return a world in which a move has just begun."""
    world = two_devices(folder, "a", "b", settings={"b": {"devices": ("one",)}}, **more)
    await press(world, a=5.0, b=5.0)
    await world.up("a", "b")
    assert world["a"].devices == ("one",)
    await world.tick()
    return world


@simulated_in
async def test_a_model_that_presses_on_a_busy_device_moves_and_its_source_serves_meanwhile(
    folder: Path,
) -> None:
    world = await moving(folder)
    source = world["a"]
    assert world.engines.begun[-1] == ("a", ("two",))
    held = await world.ask("a")
    assert world["a"] is source
    await world.come("a")
    target = world["a"]
    assert target is not source
    assert target.devices == ("two",)
    assert source.state is State.DRAINING
    assert source.num_leases == 1
    await world.settle()
    assert source in world.fleet.all
    held.end(Ending.DONE)
    await world.settle()
    assert source.state is State.COLD
    assert source not in world.fleet.all
    (await world.ask("a")).end(Ending.DONE)
    assert [one.verb for one in world.controller.decisions if one.verb == "move"] == ["move"]
    await world.close()


@simulated_in
async def test_a_target_that_does_not_start_is_dropped_and_the_source_goes_on(
    folder: Path,
) -> None:
    for is_short in (False, True):
        world = await moving(folder / str(is_short))
        source = world["a"]
        await world.fail("a", is_out_of_memory=is_short)
        assert world["a"] is source
        assert source.state in {State.WARM, State.YIELDED}
        assert len(world.fleet.all) == 2
        assert "it stays" in [one.reason for one in world.controller.decisions][-1]
        num_begun = len(world.engines.begun)
        await world.tick()
        assert len(world.engines.begun) == num_begun  # it rests before it is tried again
        await world.close()


@simulated_in
async def test_a_model_that_a_reload_takes_out_while_it_moves_leaves_nothing(
    folder: Path,
) -> None:
    world = await moving(folder)
    del world.more["a"]
    world.fleet.reload(world.settings())
    await world.settle()
    await world.come("a")
    assert "a" not in world.fleet.models
    assert [model.id for model in world.fleet.all] == ["b"]
    await world.close()


@simulated_in
async def test_nobody_moves_where_the_host_has_no_room_for_a_second_engine(folder: Path) -> None:
    world = await moving(folder, host=25.0)  # two processes, and two copies of the weights
    assert len(world.engines.begun) == 2
    await world.close()


@simulated_in
async def test_an_end_in_the_middle_of_a_move_leaves_no_engine(folder: Path) -> None:
    world = await moving(folder)
    assert len(world.fleet.all) == 3
    await world.close()
    assert not world.engines.coming
    assert all(model.state is State.COLD for model in world.fleet.all)


@simulated_in
async def test_numbers_name_devices_as_well_as_ledgers_do(folder: Path) -> None:
    world = two_devices(folder, "a", settings={"a": {"devices": ("1",)}})
    asked = world.ask("a")
    await world.settle()
    machine = world.look()
    numbered = MachineView(
        machine.devices, machine.budget_bytes, {}, 0, 0, {"one": "0", "two": "1"}
    )
    world.controller.tick(numbered, world.clock())
    await world.settle()
    assert world.engines.begun == [("a", ("two",))]
    asked.cancel()
    await world.close()


@simulated_in
async def test_one_that_fits_beside_nobody_goes_where_somebody_may_go(folder: Path) -> None:
    world = World(
        folder,
        {"a": Takes(residue=50.0), "b": Takes(residue=50.0), "c": Takes(residue=60.0)},
        devices=TWO,
    )
    await world.down("c")
    await world.up("a", "b")
    held = await world.ask("a")
    device = world["b"].devices
    await world.age()
    asked = world.ask("c")
    for _ in range(3):
        await world.tick()
    assert world["b"].state is State.COLD
    assert world["c"].devices == device
    await world.come("c")
    for lease in (held, await asked):
        lease.end(Ending.DONE)
    await world.close()


@simulated_in
async def test_who_places_over_many_machines_sees_what_places_here(folder: Path) -> None:
    world = two_devices(folder, "a", "b", "c", settings={"b": {"pin": True, "when_idle": "stay"}})
    await press(world, a=5.0)
    assert world.controller.scene().rooms == ()
    await world.up("a", "b")
    await world.tick()
    whole, part = world.controller.scene(), world.controller.scene(is_whole=False)
    assert {model.id: model.current for model in whole.models} == {
        "a": ("one",),
        "b": ("two",),
        "c": (),
    }
    assert {model.id for model in part.models} == {"a", "b"}
    assert [room.id for room in whole.rooms] == ["one", "two"]
    assert whole.staying == {"b"}
    assert next(model for model in whole.models if model.id == "a").weighted_rate == 5.0
    await world.close()
