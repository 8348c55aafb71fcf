"""Requests to models that are up, where what idle engines keep leaves no room for them."""

import asyncio
from pathlib import Path

from helpers.gateway_fleet import Takes, World, simulated_in
from helpers.gateway_runner import FakeEngine

from kvcached_core.units import GIB
from kvcached_gateway.engines.starving import STARVED_SECONDS
from kvcached_gateway.lease import Ending
from kvcached_gateway.models.model import Model
from kvcached_gateway.state import State

LARGE_PAGE = Takes(page=30.0)


async def look_on(world: World, seconds: float) -> None:
    """Let the controller look again and again."""
    for _ in range(int(seconds)):
        await world.tick()
        await asyncio.sleep(1)


def give_late(world: World, gib: int) -> None:
    """Let what an engine has be free when it is gone, and not when its end begins."""

    def changed(_model: Model, _before: State, after: State, _why: str) -> None:
        world.others_bytes = gib * GIB if after is State.DRAINING else 0

    world.fleet.on_change.append(changed)


@simulated_in
async def test_an_idle_model_is_stopped_for_a_request_that_does_not_fit_beside_its_first_page(
    folder: Path,
) -> None:
    world = World(folder, dict.fromkeys("ab", LARGE_PAGE))
    await world.up("a", "b")
    held = await world.ask("b")
    world.waiting["b"] = 30.0  # and 20 are free
    await look_on(world, STARVED_SECONDS - 1)
    assert world.are_up == {"a", "b"}
    await look_on(world, 3)
    assert world.states == {"a": State.COLD, "b": State.BUSY}
    assert "'b' needs its memory" in world["a"].reason
    stop = next(one for one in world.controller.decisions if one.verb == "stop")
    assert stop.inputs == {"missing": {"gpu": 10 * GIB}}
    world.waiting.clear()
    await look_on(world, 3)
    assert world.waits_for("b") == ""
    held.end(Ending.DONE)
    await world.close()


@simulated_in
async def test_no_more_are_stopped_than_are_needed_also_while_one_is_ending(folder: Path) -> None:
    world = World(folder, dict.fromkeys("abc", Takes(page=20.0)))
    await world.up_now("a", "b", end_seconds=10.0)
    await world.up_now("c")
    await world.age()
    held = await world.ask("c")
    give_late(world, 20)
    world.waiting["c"] = 30.0
    await look_on(world, STARVED_SECONDS + 5)
    assert sorted(world.states.values()) == [State.BUSY, State.DRAINING, State.WARM]
    await look_on(world, 30)
    assert sorted(world.states.values()) == [State.BUSY, State.COLD, State.WARM]
    held.end(Ending.DONE)
    await world.close()


@simulated_in
async def test_no_more_are_stopped_where_one_ended_during_a_look(folder: Path) -> None:
    for tenths in range(1, 12):
        world = World(folder, dict.fromkeys("abc", Takes(page=20.0)))
        await world.up_now("a", "b", end_seconds=tenths / 10)
        await world.up_now("c")
        await world.age()
        held = await world.ask("c")
        world.waiting["c"] = 30.0
        async with world.running(look_seconds=0.4):
            await asyncio.sleep(STARVED_SECONDS + 5)
        assert sorted(world.states.values()) == [State.BUSY, State.COLD, State.WARM], tenths
        held.end(Ending.DONE)
        await world.close()


@simulated_in
async def test_nobody_is_stopped_while_another_one_ends_there_whatever_for(folder: Path) -> None:
    world = World(folder, dict.fromkeys("abc", Takes(page=20.0)))
    await world.up_now("a", "b", end_seconds=10.0)
    await world.up_now("c")
    await world.age()
    held = await world.ask("c")
    world.waiting["c"] = 30.0
    await look_on(world, STARVED_SECONDS - 2)
    give_late(world, 20)
    world["a"].stop("somebody said so")
    await look_on(world, 20)
    assert world.states == {"a": State.COLD, "b": State.WARM, "c": State.BUSY}
    held.end(Ending.DONE)
    await world.close()


@simulated_in
async def test_nobody_is_stopped_for_what_running_requests_will_give_back(folder: Path) -> None:
    world = World(folder, {"idle": Takes(page=20.0), "a": Takes(page=5.0), "b": Takes(page=5.0)})
    await world.up("idle", "a", "b")
    held = [await world.ask("a"), await world.ask("b")]
    for whose in "ab":
        world.used, world.waiting = {whose: 30.0}, {"b": 35.0}
        await look_on(world, 3 * STARVED_SECONDS)
        assert world.are_up == {"idle", "a", "b"}
    for lease in held:
        lease.end(Ending.DONE)
    await world.close()


@simulated_in
async def test_nobody_is_stopped_where_that_is_not_enough_and_it_is_said_why(folder: Path) -> None:
    world = World(folder, dict.fromkeys("ab", LARGE_PAGE), settings={"a": {"pin": True}})
    await world.up("a", "b")
    held = await world.ask("b")
    world.waiting["b"] = 30.0
    await look_on(world, 2 * STARVED_SECONDS)
    assert world.are_up == {"a", "b"}
    assert "'a' is pinned" in world.waits_for("b")
    held.end(Ending.DONE)
    await look_on(world, 2)
    assert world.waits_for("b") == ""
    await world.close()


@simulated_in
async def test_an_idle_model_is_stopped_for_weights_that_have_no_room_to_come_back(
    folder: Path,
) -> None:
    world = World(folder, {"a": Takes(page=45.0), "b": Takes(page=10.0, weights=30.0)})
    await world.down("a")
    await world.up("b")
    world.yielded.add("b")
    await world.up("a")
    held = await world.ask("b")
    await look_on(world, STARVED_SECONDS - 1)
    assert world.are_up == {"a", "b"}
    await look_on(world, 3)
    assert world.states == {"a": State.COLD, "b": State.BUSY}
    held.end(Ending.DONE)
    await world.close()


@simulated_in
async def test_nobody_is_stopped_while_somebody_starts_there(folder: Path) -> None:
    world = World(folder, {"a": LARGE_PAGE, "b": LARGE_PAGE, "c": Takes()})
    await world.up("a", "b")
    held = await world.ask("b")
    asked = world.ask("c")
    await world.tick()
    world.waiting["b"] = 30.0
    await look_on(world, 2 * STARVED_SECONDS)
    assert world.states == {"a": State.WARM, "b": State.BUSY, "c": State.STARTING}
    await world.come("c")
    await look_on(world, 2)
    assert world["a"].state is State.COLD
    for lease in (held, await asked):
        lease.end(Ending.DONE)
    await world.close()


@simulated_in
async def test_of_two_that_wait_for_each_other_the_later_one_is_stopped_at_once(
    folder: Path,
) -> None:
    world = World(folder, dict.fromkeys("ab", Takes(page=30.0, least=30.0)))
    await world.up("a", "b")
    held = [await world.ask("b")]
    engine = world["a"].engine
    world.waiting["b"] = 30.0
    await look_on(world, 2)
    held.append(await world.ask("a"))
    world.waiting["a"] = 30.0
    await look_on(world, STARVED_SECONDS + 3)
    assert world.states == {"a": State.COLD, "b": State.BUSY}
    assert isinstance(engine, FakeEngine)
    assert engine.endings == ["aborted"]  # so that its request has no answer, and is asked again
    world.waiting, world.used = {}, {"b": 30.0}
    again = world.ask("a")
    await look_on(world, 2)
    assert "'b' is busy" in world.waits_for("a")
    world.used.clear()
    held[0].end(Ending.DONE)
    await world.tick()
    await world.come("a")
    (await again).end(Ending.DONE)
    await world.close()


@simulated_in
async def test_an_idle_model_goes_before_one_that_waits_in_the_same_way(folder: Path) -> None:
    world = World(folder, dict.fromkeys("abc", Takes(page=25.0)))
    await world.up("a", "b", "c")
    held = [await world.ask("a"), await world.ask("b")]
    world.waiting = {"a": 10.0, "b": 10.0}
    await look_on(world, STARVED_SECONDS + 3)
    assert world.states == {"a": State.BUSY, "b": State.BUSY, "c": State.COLD}
    for lease in held:
        lease.end(Ending.DONE)
    await world.close()


@simulated_in
async def test_one_whose_answer_has_begun_is_not_stopped_for_another(folder: Path) -> None:
    world = World(folder, dict.fromkeys("ab", LARGE_PAGE))
    await world.up("a", "b")
    held = [await world.ask("a"), await world.ask("b")]
    world.waiting = {"a": 30.0, "b": 30.0}
    held[1].first_byte()
    await look_on(world, 2 * STARVED_SECONDS)
    assert world.are_up == {"a", "b"}
    assert "'b' is busy" in world.waits_for("a")
    for lease in held:
        lease.end(Ending.DONE)
    await world.close()


@simulated_in
async def test_one_whose_answer_begins_just_then_serves_on_and_is_nobodys_to_wait_for(
    folder: Path,
) -> None:
    world = World(folder, dict.fromkeys("ab", LARGE_PAGE))
    await world.up("a", "b")
    held = [await world.ask("a")]
    world.waiting["a"] = 30.0
    await look_on(world, 2)
    held.append(await world.ask("b"))
    world.waiting["b"] = 30.0
    await look_on(world, STARVED_SECONDS)
    world.controller.tick(world.look(), world.clock())
    assert "'b' gave back" in world.waits_for("a")
    assert held[1].first_byte()  # before the model's task does what was decided
    await look_on(world, 2)
    assert world.are_up == {"a", "b"}
    assert "'b' is busy" in world.waits_for("a")
    for lease in held:
        lease.end(Ending.DONE)
    await world.close()


@simulated_in
async def test_of_two_that_wait_for_their_turn_one_is_stopped_where_neither_can_ever_have_it(
    folder: Path,
) -> None:
    takes = Takes(page=10.0, weights=30.0, least=45.0)
    world = World(folder, dict.fromkeys("ab", takes))  # 30, 45 and the other's 10 are too many
    await world.up("a")
    world.yielded.add("a")
    await world.up_now("b")
    await world.age()
    held = [await world.ask("a"), await world.ask("b")]
    world.stalled = {"b"}
    await look_on(world, STARVED_SECONDS + 3)
    assert sorted(world.states.values()) == [State.BUSY, State.COLD]
    for lease in held:
        lease.end(Ending.DONE)
    await world.close()


@simulated_in
async def test_nobody_is_stopped_for_a_turn_that_will_come(folder: Path) -> None:
    world = World(folder, dict.fromkeys("ab", Takes(page=10.0, weights=30.0, least=35.0)))
    await world.up("a")
    world.yielded.add("a")
    await world.up("b")
    held = [await world.ask("a"), await world.ask("b")]
    world.stalled = {"b"}
    await look_on(world, 3 * STARVED_SECONDS)
    assert world.are_up == {"a", "b"}
    for lease in held:
        lease.end(Ending.DONE)
    await world.close()


@simulated_in
async def test_what_a_start_waits_for_is_said_though_its_model_waited_for_memory_before(
    folder: Path,
) -> None:
    world = World(folder, dict.fromkeys("abc", Takes(residue=1.0, page=30.0)))
    await world.up("a", "b")
    held = [await world.ask("a"), await world.ask("b")]
    world.waiting["b"] = 30.0  # and 18 are free
    await world.tick()
    world["b"].stop("a test wants it")
    held[1].end(Ending.DONE)
    await world.settle()
    world.used["a"] = 49.0  # no room is left for a start
    asked = world.ask("b")
    await world.tick()
    assert world["b"].state is State.COLD
    assert "'a' is busy" in world.waits_for("b")
    asked.cancel()
    held[0].end(Ending.DONE)
    await world.close()
