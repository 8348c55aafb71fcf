"""Models that come up before somebody asks, into memory that nobody has to leave."""

import asyncio
from datetime import UTC, datetime
from pathlib import Path

from helpers.gateway_fleet import Takes, World, simulated_in

from kvcached_gateway.control.wants import Cause, Want
from kvcached_gateway.lease import Ending
from kvcached_gateway.state import State

MONDAY = datetime(2026, 11, 30, 7, 50, tzinfo=UTC)
AT = {"warm_at": ("mon-fri 07:50 UTC",)}


def set_time(world: World, moment: datetime) -> None:
    world.controller._prewarming._moment = lambda: moment


@simulated_in
async def test_a_model_is_up_at_its_time_and_no_other(folder: Path) -> None:
    world = World(folder, {"a": Takes(), "b": Takes()}, settings={"a": AT})
    set_time(world, MONDAY.replace(minute=49))
    await world.tick()
    assert not world.engines.begun
    set_time(world, MONDAY)
    await world.tick()
    assert [name for name, _ in world.engines.begun] == ["a"]
    await world.come("a")
    (started,) = world.controller.decisions
    assert "warm_at" in started.reason
    await world.close()


@simulated_in
async def test_one_whose_longest_request_never_fits_is_up_at_its_time_all_the_same(
    folder: Path,
) -> None:
    world = World(folder, {"a": Takes(weights=60.0, least=50.0)}, settings={"a": AT})
    set_time(world, MONDAY.replace(hour=5))
    await world.down("a")
    set_time(world, MONDAY)
    await world.tick()
    assert world["a"].state is State.STARTING
    await world.close()


@simulated_in
async def test_nobody_goes_for_a_model_that_nobody_waits_for(folder: Path) -> None:
    world = World(folder, dict.fromkeys("ab", Takes(process=10.0)), host=15.0, settings={"a": AT})
    set_time(world, MONDAY.replace(hour=5))
    await world.up("b")
    set_time(world, MONDAY)
    for _ in range(3):
        await world.tick()
    assert world.states == {"a": State.COLD, "b": State.WARM}
    world.controller._starts.want(Want("a", Cause.AHEAD, "it is its time", world.clock()))
    for _ in range(3):
        await world.tick()
    assert world.states == {"a": State.COLD, "b": State.WARM}
    reasons = [one.reason for one in world.controller.decisions if one.model_id == "a"]
    assert reasons == ["it is its time, but others would have to go"]
    await world.close()


@simulated_in
async def test_a_request_makes_of_a_wish_a_want_for_which_others_go(folder: Path) -> None:
    world = World(folder, dict.fromkeys("ab", Takes(process=10.0)), host=15.0)
    await world.up("b")
    world.controller._starts.want(Want("a", Cause.AHEAD, "it is its time", world.clock()))
    asked = world.ask("a")
    for _ in range(3):
        await world.tick()
    assert world.states == {"a": State.STARTING, "b": State.COLD}
    await world.come("a")
    (await asked).end(Ending.DONE)
    await world.close()


@simulated_in
async def test_companions_come_up_one_with_the_other_and_go_down_alone(folder: Path) -> None:
    world = World(folder, {"a": Takes(), "b": Takes()}, settings={"b": {"warm_with": ("a",)}})
    asked = world.ask("a")
    await world.tick()
    await world.come("a")
    (await asked).end(Ending.DONE)
    await world.tick()
    assert world["b"].state is State.STARTING
    await world.come("b")
    await asyncio.sleep(100)
    world["b"].stop("a test wants it")
    await world.tick()
    await world.tick()
    assert world["b"].state is State.COLD  # `a` came up before it went down
    await world.close()


@simulated_in
async def test_a_yielded_model_is_woken_for_its_companion(
    folder: Path,
) -> None:
    world = World(
        folder,
        {"a": Takes(), "b": Takes(weights=10.0)},
        settings={"b": {"warm_with": ("a",)}},
    )
    await world.up("b")
    woken: list[str] = []
    world.controller._prewarming.wake = (  # type: ignore[method-assign]
        lambda model: woken.append(model.id)
    )
    world.yielded.add("b")
    await world.tick()
    assert world["b"].state is State.YIELDED
    assert not woken
    await asyncio.sleep(1)
    asked = world.ask("a")
    await world.tick()
    await world.tick()
    assert woken[:1] == ["b"]
    asked.cancel()
    await world.close()


def test_a_wake_that_comes_to_nothing_is_a_decision(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path, {"a": Takes()})
        world.controller._prewarming.wake(world["a"])
        (task,) = world.controller._prewarming._wakes
        await task
        (decision,) = world.controller.decisions
        assert "it does not wake" in decision.reason
        assert "a" in decision.reason
        await world.close()

    asyncio.run(main())
