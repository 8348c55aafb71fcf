"""What a reload does to models, what is written down of them, and what an adoption takes over."""

import asyncio
from pathlib import Path

from helpers.gateway_fleet import Takes, World, simulated_in
from helpers.gateway_line import refused
from helpers.gateway_runner import FakeEngine, record_of

from kvcached_gateway.lease import Ending
from kvcached_gateway.state import State

AB = {"a": Takes(), "b": Takes()}


@simulated_in
async def test_a_reload_leaves_untouched_models_as_they_are_and_ends_those_that_are_gone(
    folder: Path,
) -> None:
    world = World(folder, AB)
    await world.up("a", "b")
    kept, gone = world["a"], world["b"]
    held = await world.ask("b")
    del world.more["b"]
    world.takes["c"], world.more["c"] = Takes(), {}
    found = world.fleet.reload(world.settings())
    assert (found.added, found.removed, found.changed) == (("c",), ("b",), ())
    await world.settle()
    assert list(world.fleet.models) == ["a", "c"]
    assert world["a"] is kept
    assert kept.state is State.WARM
    assert gone.state is State.DRAINING
    assert (await refused(world.ask("b"))).code == "model_not_found"
    held.end(Ending.DONE)
    await world.settle()
    assert gone.state is State.COLD
    assert gone not in world.fleet.all
    await world.up("c")
    await world.close()


@simulated_in
async def test_whoever_waits_for_a_model_that_a_reload_takes_out_is_told(folder: Path) -> None:
    world = World(folder, AB, host=1.5)
    await world.up("a")
    held = await world.ask("a")
    asked = world.ask("b")
    await world.tick()
    del world.more["b"]
    found = world.fleet.reload(world.settings())
    for name in found.removed:
        world.line.changed(name)
    assert (await refused(asked)).code == "model_not_found"
    held.end(Ending.DONE)
    await world.close()


@simulated_in
async def test_a_changed_model_starts_again_when_it_is_idle(folder: Path) -> None:
    world = World(folder, AB)
    await world.up("a", "b")
    held = await world.ask("a")
    world.more["a"]["args"] = ("--enforce-eager",)
    assert world.fleet.reload(world.settings()).changed == ("a",)
    await world.tick()
    assert world["a"].state is State.BUSY
    held.end(Ending.DONE)
    await world.tick()
    await world.tick()
    assert world["a"].state is State.STARTING
    await world.come("a")
    await world.tick()
    assert world.states == {"a": State.WARM, "b": State.WARM}
    assert world["a"].num_starts == 2
    assert world["b"].num_starts == 1
    await world.close()


@simulated_in
async def test_who_asks_for_a_name_that_a_reload_brought_waits_for_the_engine_that_knows_it(
    folder: Path,
) -> None:
    world = World(folder, AB)
    await world.up("a")
    held = await world.ask("a")
    engine = world["a"].engine
    assert isinstance(engine, FakeEngine)
    engine.unknown = frozenset({"new"})
    world.more["a"]["aliases"] = ("new",)
    world.fleet.reload(world.settings())
    asked = [world.ask(name) for name in ("new", "a")]
    await world.tick()
    assert not any(task.done() for task in asked)
    held.end(Ending.DONE)
    await world.tick()
    await world.tick()
    assert world["a"].state is State.STARTING
    await world.come("a")
    for task in asked:
        (await task).end(Ending.DONE)
    assert world["a"].engine is not engine
    await world.close()


@simulated_in
async def test_what_runs_is_written_down_and_nothing_is_where_all_of_it_ended(
    folder: Path,
) -> None:
    world = World(folder, AB)
    await world.up("a", "b")
    assert {record.model_id for record in world.folder.read()} == {"a", "b"}
    world["a"].stop("a test wants it")
    await world.settle()
    assert {record.model_id for record in world.folder.read()} == {"b"}
    await world.fleet.close(is_kept=False, drain_seconds=0.0)
    world.fleet.write()
    assert world.folder.read() == []
    world.folder.close()


@simulated_in
async def test_engines_that_are_kept_stay_written_down_whoever_is_left_first(
    folder: Path,
) -> None:
    world = World(folder, AB)
    await world.up("a", "b")
    held = await world.ask("a")
    closing = asyncio.ensure_future(world.fleet.close(is_kept=True, drain_seconds=60.0))
    await asyncio.sleep(10)
    assert {record.model_id for record in world.folder.read()} == {"a", "b"}
    held.end(Ending.DONE)
    await closing
    assert {record.model_id for record in world.folder.read()} == {"a", "b"}
    world.folder.close()


def test_each_model_takes_over_its_engine_and_nobody_that_of_another(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path, AB)
        for name in ("a", "a"):
            world.fleet._adopt(record_of(name))
        assert not world.fleet._adopt(record_of("gone"))
        await world.settle()
        assert world.states == {"a": State.WARM, "b": State.COLD}
        assert world["a"].num_starts == 3
        await world.close()

    asyncio.run(main())


@simulated_in
async def test_the_log_of_a_model_is_its_engines_or_that_of_the_last_one(folder: Path) -> None:
    world = World(folder, AB)
    assert world.fleet.log_of(world["a"]) == ""
    (world.folder.logs / "a.log").touch()
    assert world.fleet.log_of(world["a"]) == str(world.folder.logs / "a.log")
    await world.up("a")
    assert world.fleet.log_of(world["a"]) == record_of("a").log
    await world.close()
