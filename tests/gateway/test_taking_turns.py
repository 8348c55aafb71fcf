"""Models that are up and always asked, on a device without room for the weights of all of them."""

import asyncio
from itertools import pairwise
from pathlib import Path

from helpers.gateway_fleet import Takes, World, simulated_in
from helpers.gateway_line import refused

from kvcached_core.errors import BackendError
from kvcached_gateway.control.machine import MachineView
from kvcached_gateway.control.turns import TAKEN_SECONDS
from kvcached_gateway.lease import Ending, Lease

LARGE = Takes(page=1.0, weights=30.0)  # two of 80 GiB, and not three
TURN = 10


async def look_on(world: World, seconds: float) -> None:
    """Let the controller look again and again."""
    for _ in range(int(seconds)):
        await asyncio.sleep(1)
        await world.tick()


async def three(folder: Path, **settings: dict[str, object]) -> tuple[World, dict[str, Lease]]:
    """Return a world in which two models are busy, and a third waits for its weights."""
    world = World(folder, dict.fromkeys("abc", LARGE), settings=settings)
    await world.up("c")
    world.yielded = {"c"}
    await world.up_now("a")
    await look_on(world, 5)
    await world.up_now("b")
    await world.age()
    await world.tick()
    leases = {name: await world.ask(name) for name in "abc"}
    return world, leases


async def close(world: World, *leases: Lease) -> None:
    for lease in leases:
        lease.end(Ending.DONE)
    await world.close()


@simulated_in
async def test_who_has_had_its_weights_longest_takes_no_new_requests_until_the_waiter_has_its_own(
    folder: Path,
) -> None:
    world, leases = await three(folder)
    await look_on(world, TURN)
    assert not world.controller.held("a")
    await look_on(world, 2)
    assert "'a' takes no new requests until 'c' has its weights" in world.controller.held("a")
    assert "it holds back: 'a' takes" in world.controller.explain("a")
    assert "it waits: 'a' takes" in world.controller.explain("c")
    assert not world.controller.held("b")
    waiting = [world.ask("a"), world.ask("a")]
    await world.settle()
    assert not any(each.done() for each in waiting)
    (await world.ask("b")).end(Ending.DONE)
    leases["a"].end(Ending.DONE)  # its answer was not cut
    await look_on(world, TAKEN_SECONDS - 2)
    assert not any(each.done() for each in waiting)
    world.yielded = {"a"}
    await world.tick()
    more = [await each for each in waiting]
    assert [lease.model_id for lease in more] == ["a", "a"]
    assert world.controller.held("a") == ""
    assert world.waits_for("c") == ""
    assert [one.model_id for one in world.controller.decisions if one.verb == "hold"] == ["a"]
    await close(world, leases["b"], leases["c"], *more)


@simulated_in
async def test_models_take_turns_no_faster_than_a_turn(folder: Path) -> None:
    world, leases = await three(folder)
    held: list[tuple[str, float]] = []
    for _ in range(8 * TURN):
        await look_on(world, 1)
        for name in "abc":
            if world.controller.held(name) and name in leases:
                held.append((name, world.clock()))
                leases.pop(name).end(Ending.DONE)
                world.yielded = {name}
            elif name not in leases and not world.controller.held(name):
                leases[name] = await world.ask(name)
    names, times = [name for name, _ in held], [at for _, at in held]
    assert names[:6] == ["a", "b", "c", "a", "b", "c"]
    assert all(TURN <= later - at <= TURN + 4 for at, later in pairwise(times))
    await close(world, *leases.values())


@simulated_in
async def test_nobody_holds_back_for_what_idle_ones_or_requests_that_end_give(folder: Path) -> None:
    world, leases = await three(folder)
    leases["b"].end(Ending.DONE)
    await look_on(world, 3 * TURN)
    assert not any(world.controller.held(name) for name in "abc")
    leases["b"] = await world.ask("b")
    world.takes["c"] = Takes(page=1.0, weights=10.0)
    world.used = {"a": 9.0}
    await look_on(world, 3 * TURN)
    assert not any(world.controller.held(name) for name in "abc")
    await close(world, *leases.values())


@simulated_in
async def test_nobody_pinned_holds_back_and_it_is_said_why(folder: Path) -> None:
    world, leases = await three(folder, a={"pin": True}, b={"pin": True})
    await look_on(world, 2 * TURN)
    assert not any(world.controller.held(name) for name in "abc")
    assert "nobody holds back for it: 'a' is pinned; 'b' is pinned" in world.waits_for("c")
    world.controller.pin("b", is_pinned=False)
    await look_on(world, 1)
    assert world.controller.held("b")
    await close(world, *leases.values())


@simulated_in
async def test_it_is_over_when_nobody_waits_or_the_model_goes_down(folder: Path) -> None:
    for end in ("waiter", "holder", "setting"):
        world, leases = await three(folder)
        await look_on(world, TURN + 2)
        assert world.controller.held("a")
        waiting = world.ask("a")
        if end == "waiter":
            leases.pop("c").end(Ending.CANCELLED)
        elif end == "holder":
            world["a"].stop("a test wants it")
        else:
            world.turn_seconds = 0.0
            world.fleet.reload(world.settings())
        await world.tick()
        assert world.controller.held("a") == ""
        if end == "holder":
            leases.pop("a").end(Ending.DONE)
            waiting.cancel()
        else:
            leases["more"] = await waiting
        await close(world, *leases.values())


@simulated_in
async def test_nobody_holds_back_while_nothing_can_be_seen(folder: Path) -> None:
    world, leases = await three(folder)
    await look_on(world, TURN + 2)
    waiting = world.ask("a")
    await world.settle()
    assert not waiting.done()

    async def look() -> MachineView:
        raise BackendError("nvmlDeviceGetMemoryInfo", "the GPU is lost", 15)

    world.controller._look = look
    async with world.running(look_seconds=0.0):
        leases["more"] = await waiting
    assert world.controller.held("a") == ""
    assert world.controller.decisions.hindrance("c") == ""
    await close(world, *leases.values())


@simulated_in
async def test_a_setting_of_0_lets_it_wait(folder: Path) -> None:
    world, leases = await three(folder)
    world.turn_seconds = 0.0
    world.fleet.reload(world.settings())
    await look_on(world, 5 * TURN)
    assert not any(world.controller.held(name) for name in "abc")
    await close(world, *leases.values())


@simulated_in
async def test_nobody_waits_for_one_that_leaves_what_others_gave_up(folder: Path) -> None:
    world, leases = await three(folder)
    await look_on(world, TURN + 2)
    assert world.controller.held("a")
    waiting = world.ask("a")
    leases.pop("a").end(Ending.DONE)
    await look_on(world, TAKEN_SECONDS + 2)  # it lacks something else
    assert world.controller.held("a") == ""
    leases["a"] = await waiting
    await look_on(world, TURN - 3)
    assert world.controller.held("a") == ""
    await close(world, *leases.values())


@simulated_in
async def test_a_client_that_reads_slowly_lets_nobody_hold_back(folder: Path) -> None:
    world, leases = await three(folder)
    leases["c"].first_byte()  # it was answered, and its weights went to others
    await look_on(world, 3 * TURN)
    assert not any(world.controller.held(name) for name in "abc")
    await close(world, *leases.values())


@simulated_in
async def test_requests_at_one_that_holds_back_wait_no_longer_than_others(folder: Path) -> None:
    world, leases = await three(folder, a={"max_wait": 5.0})
    await look_on(world, TURN + 2)
    assert world.controller.held("a")
    error = await refused(world.ask("a"))
    assert (error.status, error.code) == (503, "model_busy")
    assert "'a' takes no new requests until 'c' has its weights" in error.message
    await close(world, *leases.values())


@simulated_in
async def test_one_that_has_its_weights_and_no_room_for_a_request_has_its_turn(
    folder: Path,
) -> None:
    world = World(folder, {"a": LARGE, "b": Takes(page=1.0, weights=30.0, least=40.0)})
    await world.up("a", "b")
    leases = [await world.ask(name) for name in "ab"]
    world.stalled = {"b"}  # its longest request takes 40 GiB beside 18 that are free
    await look_on(world, TURN + 2)
    assert world.controller.held("a")
    world.stalled.clear()
    await look_on(world, 1)
    assert world.controller.held("a") == ""
    await close(world, *leases)
