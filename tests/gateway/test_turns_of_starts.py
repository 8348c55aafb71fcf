"""Models that have to start beside two that are always asked, where their memory has no room."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from helpers.gateway_fleet import Takes, World, simulated_in
from helpers.gateway_line import refused

from kvcached_gateway.control.stops import OFFER_SECONDS
from kvcached_gateway.control.turns import TAKEN_SECONDS
from kvcached_gateway.lease import Ending, Lease
from kvcached_gateway.settings.config import KvSettings
from kvcached_gateway.state import State

YIELDS = Takes(residue=1.0, weights=35.0, page=0.5)  # two of 80 GiB, and not three
STAYS = Takes(residue=35.0, page=0.5)  # likewise, and only an end gives it back
TURN = 10
HELD = "'a' takes no new requests until 'c' has its weights"


async def look_on(world: World, seconds: float) -> None:
    """Let the controller look again and again."""
    for _ in range(int(seconds)):
        await asyncio.sleep(1)
        await world.tick()


async def two_busy(
    folder: Path,
    sizes: Takes | Mapping[str, Takes] = YIELDS,
    **more: Any,
) -> tuple[World, dict[str, Lease]]:
    """Return a world in which two models are busy, and have been for long; the others are down."""
    takes = dict.fromkeys("abc", sizes) if isinstance(sizes, Takes) else dict(sizes)
    world = World(folder, takes, **more)
    await world.down(*[name for name in takes if name not in "ab"])
    await world.up_now("a")
    await look_on(world, 5)
    await world.up("b")
    leases = {name: await world.ask(name) for name in "ab"}
    await look_on(world, 2 * TURN)
    return world, leases


async def close(world: World, *leases: Lease) -> None:
    for lease in leases:
        lease.end(Ending.DONE)
    await world.close()


def stopped(world: World) -> list[str]:
    """Return whom the controller stopped for another model."""
    return [one.model_id for one in world.controller.decisions if one.verb == "stop"]


@simulated_in
async def test_who_has_had_its_weights_longest_holds_back_until_the_start_has_its_memory(
    folder: Path,
) -> None:
    world, leases = await two_busy(folder)
    asked = world.ask("c")
    await look_on(world, TURN)
    assert not world.controller.held("a")
    await look_on(world, 2)
    assert HELD in world.controller.held("a")
    await world.tick()
    assert f"{HELD}: it has waited more than 10 s for" in world.waits_for("c")
    assert not world.controller.held("b")
    waiting = world.ask("a")
    (await world.ask("b")).end(Ending.DONE)
    leases.pop("a").end(Ending.DONE)  # its answer was not cut
    await world.tick()
    assert world["c"].state is State.STARTING
    await look_on(world, 30)  # it comes to its weights late
    assert not waiting.done()
    assert HELD in world.waits_for("c")
    world.loaded, world.yielded = {"c"}, {"a"}
    await world.tick()
    leases["a"] = await waiting
    assert world.controller.held("a") == ""
    assert world.waits_for("c") == ""
    await world.come("c")
    assert (await asked).model_id == "c"
    assert [one.model_id for one in world.controller.decisions if one.verb == "hold"] == ["a"]
    assert stopped(world) == []
    await close(world, *leases.values())


@simulated_in
async def test_it_is_over_when_the_model_is_up(folder: Path) -> None:
    world, leases = await two_busy(folder)
    asked = world.ask("c")
    await look_on(world, TURN + 2)
    leases.pop("a").end(Ending.DONE)
    await world.tick()
    world.yielded = {"a"}
    await world.come("c")
    assert world.controller.held("a")
    await world.tick()
    assert world.controller.held("a") == ""
    await close(world, *leases.values(), await asked)


@simulated_in
async def test_one_that_is_up_and_waits_for_its_weights_waits_for_a_turn_again(
    folder: Path,
) -> None:
    world, leases = await two_busy(folder)
    asked = world.ask("c")
    await look_on(world, TURN + 2)
    leases["a"].end(Ending.DONE)
    await world.tick()
    await world.come("c")
    leases["c"] = await asked
    world.yielded = {"c"}  # somebody had them before its first request
    await world.tick()
    assert world.controller.held("a") == ""
    leases["a"] = await world.ask("a")
    await look_on(world, TURN - 1)
    assert not any(map(world.controller.held, "ab"))
    await look_on(world, 3)
    assert any(map(world.controller.held, "ab"))
    await close(world, *leases.values())


@simulated_in
async def test_one_that_gives_nothing_while_it_is_up_is_stopped_and_does_not_start_first(
    folder: Path,
) -> None:
    world, leases = await two_busy(folder, STAYS, settings={"a": {"max_concurrent": 1}})
    waiting = world.ask("a")  # before the other one
    await look_on(world, 1)
    asked = world.ask("c")
    await look_on(world, TURN + 2)
    assert HELD in world.controller.held("a")
    await look_on(world, 5)
    assert world["a"].state is State.BUSY
    leases.pop("a").end(Ending.DONE)
    await look_on(world, OFFER_SECONDS + 3)
    assert world.states == {"a": State.COLD, "b": State.BUSY, "c": State.STARTING}
    assert HELD in world.waits_for("a")
    assert stopped(world) == ["a"]
    await world.come("c")
    await look_on(world, TURN + 3)
    assert "'b' takes no new requests until 'a' has its weights" in world.controller.held("b")
    leases.pop("b").end(Ending.DONE)
    await look_on(world, OFFER_SECONDS + 3)
    assert world.states == {"a": State.STARTING, "b": State.COLD, "c": State.BUSY}
    await world.come("a")
    await close(world, await waiting, await asked)


@simulated_in
async def test_it_is_the_same_for_memory_of_the_host(folder: Path) -> None:
    world, leases = await two_busy(folder, Takes(process=10.0), host=25.0)
    asked = world.ask("c")
    await look_on(world, TURN + 2)
    assert "5 GiB on host memory" in world.controller.held("a")
    leases.pop("a").end(Ending.DONE)
    await look_on(world, OFFER_SECONDS + 3)
    assert world.states == {"a": State.COLD, "b": State.BUSY, "c": State.STARTING}
    await world.come("c")
    await close(world, *leases.values(), await asked)


@simulated_in
async def test_nobody_pinned_or_of_a_higher_priority_holds_back_and_it_is_said_why(
    folder: Path,
) -> None:
    above: dict[str, Any] = {"kv": KvSettings(priority=1)}
    world, leases = await two_busy(folder, settings={"a": {"pin": True}, "b": above})
    asked = world.ask("c")
    await look_on(world, 2 * TURN)
    assert not any(map(world.controller.held, "ab"))
    reason = "nobody holds back for it: 'a' is pinned; 'b' has a higher priority"
    assert reason in world.waits_for("c")
    world.controller.pin("a", is_pinned=False)
    await look_on(world, 1)
    assert world.controller.held("a")
    asked.cancel()
    await close(world, *leases.values())


@simulated_in
async def test_one_that_holds_back_while_requests_wait_for_it_is_not_idle(folder: Path) -> None:
    world, leases = await two_busy(folder)
    world.more["a"]["idle_limit_seconds"] = 5.0
    world.fleet.reload(world.settings())
    asked = world.ask("c")
    await look_on(world, TURN + 2)
    waiting = world.ask("a")
    leases.pop("a").end(Ending.DONE)
    await look_on(world, TURN)
    assert world["c"].state is State.STARTING
    assert world.controller.held("a")
    assert world["a"].state is State.WARM
    waiting.cancel()
    await look_on(world, 1)
    assert stopped(world) == ["a"]
    asked.cancel()
    await close(world, *leases.values())


@simulated_in
async def test_one_that_is_asked_is_not_stopped_for_a_start_that_nobody_waits_for_any_more(
    folder: Path,
) -> None:
    world, leases = await two_busy(folder, STAYS, settings={"c": {"max_wait_seconds": 1.5 * TURN}})
    world.controller.warm("c")  # so that it is wanted without a request, too
    await look_on(world, 5)
    asked = world.ask("c")
    await look_on(world, TURN + 2)
    waiting = world.ask("a")
    leases.pop("a").end(Ending.DONE)
    await asyncio.sleep(OFFER_SECONDS + 0.5)
    assert world.controller.held("a")
    asked.cancel()
    await world.tick()
    leases["a"] = await waiting
    assert stopped(world) == []
    assert "'a' is busy" in world.waits_for("c")
    await close(world, *leases.values())


@pytest.mark.parametrize("who", ["operator", "refused client"])
def test_a_start_that_was_ordered_has_its_turn_though_no_request_waits(
    who: str, tmp_path: Path
) -> None:
    @simulated_in
    async def main(folder: Path) -> None:
        world, leases = await two_busy(folder, STAYS)
        if who == "operator":
            world.controller.warm("c")
        else:
            world.more["c"]["loading"] = "refuse"
            world.fleet.reload(world.settings())
            assert (await refused(world.ask("c"))).code == "model_loading"
        await look_on(world, TURN + 2)
        assert HELD in world.controller.held("a")
        waiting = world.ask("a")
        leases.pop("a").end(Ending.DONE)
        await look_on(world, OFFER_SECONDS + 30)
        assert world.states == {"a": State.COLD, "b": State.BUSY, "c": State.STARTING}
        assert HELD in world.waits_for("a")  # also while that engine comes to its memory
        await world.come("c")
        await look_on(world, 1)
        assert not world.controller.held("a")
        waiting.cancel()
        await close(world, *leases.values())

    main(tmp_path)


@simulated_in
async def test_a_start_that_was_ordered_waits_as_long_as_a_request_would(folder: Path) -> None:
    world, leases = await two_busy(folder, settings={"c": {"max_wait_seconds": 2.0 * TURN}})
    for _ in range(2):
        world.controller.warm("c")
        await look_on(world, TURN + 2)
        assert world.controller.held("a")
        waiting = world.ask("a")
        await look_on(world, TURN)
        assert not world.controller.held("a")
        (await waiting).end(Ending.DONE)
        await look_on(world, 2 * TURN)
        assert not any(map(world.controller.held, "ab"))
    leases.pop("b").end(Ending.DONE)
    await world.tick()
    assert world["c"].state is State.STARTING  # it is wanted all the same
    await close(world, *leases.values())


@simulated_in
async def test_what_was_ordered_is_no_order_of_a_later_start(folder: Path) -> None:
    world = World(folder, dict.fromkeys("abc", YIELDS))
    world.controller.warm("c")
    await world.tick()
    await world.come("c")
    await world.tick()
    world["c"].stop("somebody said so")
    await world.up_now("a", "b")
    leases = [await world.ask(name) for name in "ab"]
    await look_on(world, 2 * TURN)
    asked = world.ask("c")
    await look_on(world, TURN + 2)
    held = [name for name in "ab" if world.controller.held(name)]
    assert held
    leases.pop("ab".index(held[0])).end(Ending.DONE)
    await world.tick()
    assert world["c"].state is State.STARTING
    asked.cancel()
    await world.tick()
    assert not any(map(world.controller.held, "ab"))
    await close(world, *leases)


@simulated_in
async def test_nobody_holds_back_that_could_not_be_stopped_then(folder: Path) -> None:
    world = World(folder, dict.fromkeys("abc", STAYS))
    await world.down("c")
    await world.up_now("a", "b")
    leases = [await world.ask(name) for name in "ab"]
    asked = world.ask("c")
    await look_on(world, 5 * TURN)
    assert not any(map(world.controller.held, "ab"))
    await look_on(world, 2 * TURN)  # a minute after their starts
    assert world.controller.held("a")
    asked.cancel()
    await close(world, *leases)


@simulated_in
async def test_nobody_holds_back_where_idle_ones_are_stopped_soon(folder: Path) -> None:
    world = World(folder, dict.fromkeys("abc", STAYS))
    await world.down("c")
    await world.up("b")
    lease = await world.ask("b")
    await world.up_now("a")
    asked = world.ask("c")
    await look_on(world, 5 * TURN)
    assert world.states == {"a": State.WARM, "b": State.BUSY, "c": State.COLD}
    await look_on(world, 2 * TURN)
    assert world.states == {"a": State.COLD, "b": State.BUSY, "c": State.STARTING}
    assert [one for one in world.controller.decisions if one.verb == "hold"] == []
    await world.come("c")
    await close(world, lease, await asked)


@simulated_in
async def test_as_many_hold_back_as_it_takes_and_none_is_stopped_before_all_are_idle(
    folder: Path,
) -> None:
    sizes = {"a": YIELDS, "b": YIELDS, "c": Takes(residue=1.0, weights=70.0)}
    world, leases = await two_busy(folder, sizes)
    asked = world.ask("c")
    await look_on(world, TURN + 2)
    assert world.controller.held("a").startswith("'a', 'b' take no new requests until 'c' has")
    assert world.controller.held("b")
    leases.pop("b").end(Ending.DONE)
    await look_on(world, 2 * TURN)
    assert world["c"].state is State.COLD
    leases.pop("a").end(Ending.DONE)
    await world.tick()
    assert world["c"].state is State.STARTING
    assert stopped(world) == []
    world.yielded = {"a", "b"}
    await world.come("c")
    await close(world, await asked)


@simulated_in
async def test_one_holds_back_whose_requests_have_what_is_missing(folder: Path) -> None:
    small = Takes(residue=1.0, weights=10.0)
    sizes = {"a": small, "b": small, "c": Takes(residue=1.0, weights=50.0)}
    world, leases = await two_busy(folder, sizes)
    world.used = {"b": 20.0}
    asked = world.ask("c")
    await look_on(world, TURN + 2)
    assert not world.controller.held("a")
    assert world.controller.held("b")
    world.used.clear()
    leases.pop("b").end(Ending.DONE)
    await world.tick()
    assert world["c"].state is State.STARTING
    asked.cancel()
    await close(world, *leases.values())


@pytest.mark.parametrize("end", ["client", "setting", "start", "client of a start"])
def test_it_is_over_when_nothing_comes_of_it(end: str, tmp_path: Path) -> None:
    @simulated_in
    async def main(folder: Path) -> None:
        world, leases = await two_busy(folder)
        asked = world.ask("c")
        await look_on(world, TURN + 2)
        assert world.controller.held("a")
        waiting = world.ask("a")
        if "start" in end:
            leases.pop("a").end(Ending.DONE)
            await world.tick()
            assert world["c"].state is State.STARTING
        if end == "start":
            await world.fail("c")
            assert (await refused(asked)).code == "model_failed"
        elif end == "setting":
            world.turn_seconds = 0.0
            world.fleet.reload(world.settings())
        else:
            asked.cancel()
        await world.tick()
        assert world.controller.held("a") == ""
        leases["more"] = await waiting
        asked.cancel()
        await close(world, *leases.values())

    main(tmp_path)


@simulated_in
async def test_one_whose_weights_yield_is_not_stopped_before_it_can_have_offered_them(
    folder: Path,
) -> None:
    for has_copy in (True, False):
        world, leases = await two_busy(folder)
        asked, waiting = world.ask("c"), None
        await look_on(world, TURN + 2)
        waiting = world.ask("a")
        world.uncopied = {"a"}
        leases.pop("a").end(Ending.DONE)
        await look_on(world, OFFER_SECONDS)
        assert stopped(world) == []
        assert world["c"].state is State.COLD
        if has_copy:
            world.uncopied.clear()
        await look_on(world, 3)
        assert stopped(world) == ([] if has_copy else ["a"])
        assert world["c"].state is State.STARTING
        asked.cancel()
        waiting.cancel()
        await close(world, *leases.values())


@simulated_in
async def test_nobody_waits_for_one_that_leaves_what_others_gave_up(folder: Path) -> None:
    sizes = dict.fromkeys("abc", YIELDS) | {"elsewhere": YIELDS}
    settings: dict[str, dict[str, Any]] = {name: {"devices": ("one",)} for name in "abc"}
    settings["elsewhere"] = {"devices": ("two",)}
    devices = {"one": 80.0, "two": 80.0}
    world, leases = await two_busy(folder, sizes, devices=devices, settings=settings, num_cores=4)
    asked = world.ask("c")
    await look_on(world, TURN + 2)
    other = world.ask("elsewhere")
    await world.tick()
    waiting = world.ask("a")
    leases.pop("a").end(Ending.DONE)
    await look_on(world, TAKEN_SECONDS + 2)
    assert world.waits_for("c").startswith("it waits for the start of 'elsewhere'")
    assert world.controller.held("a") == ""
    leases["a"] = await waiting
    await world.come("elsewhere")
    await look_on(world, TURN - 3)
    assert world.controller.held("a") == ""
    asked.cancel()
    await close(world, *leases.values(), await other)


@simulated_in
async def test_a_later_start_does_not_take_what_others_hold_back_for(folder: Path) -> None:
    sizes = dict.fromkeys("abc", YIELDS) | {"small": Takes(residue=1.0, weights=4.0)}
    world, leases = await two_busy(folder, sizes)
    asked = world.ask("c")
    await look_on(world, TURN + 2)
    assert world.controller.held("a")
    later = world.ask("small")
    await look_on(world, 2)
    assert world["small"].state is State.COLD
    assert world.waits_for("small") == "'c' goes first"
    leases.pop("a").end(Ending.DONE)
    await world.tick()
    assert world["c"].state is State.STARTING
    asked.cancel()
    later.cancel()
    await close(world, *leases.values())


@simulated_in
async def test_where_all_devices_are_busy_somebody_holds_back_on_one_where_that_is_enough(
    folder: Path,
) -> None:
    settings: dict[str, dict[str, Any]] = {
        "a": {"devices": ("one",), "pin": True},
        "b": {"devices": ("two",)},
    }
    world, leases = await two_busy(folder, devices={"one": 40.0, "two": 40.0}, settings=settings)
    asked = world.ask("c")
    await look_on(world, TURN + 2)
    assert not world.controller.held("a")
    assert "'b' takes no new requests until 'c' has its weights" in world.controller.held("b")
    leases.pop("b").end(Ending.DONE)
    await world.tick()
    assert world.engines.begun[-1] == ("c", ("two",))
    asked.cancel()
    await close(world, *leases.values())
