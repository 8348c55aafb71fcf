"""Which wanted models start, who has to go for them, and what the others wait for."""

import asyncio
from pathlib import Path

import pytest
from helpers.gateway_fleet import Takes, World, simulated_in
from helpers.gateway_line import refused

from kvcached_gateway.lease import Ending
from kvcached_gateway.state import State

BIG = Takes(process=10.0, residue=30.0, weights=10.0)
OTHER = Takes(residue=1.0, weights=28.0)


@simulated_in
async def test_a_model_starts_where_what_it_takes_is_free(folder: Path) -> None:
    world = World(folder, {"a": BIG})
    asked = world.ask("a")
    await world.tick()
    assert world.engines.begun == [("a", ("gpu",))]
    await world.come("a")
    assert (await asked).model_id == "a"
    await world.close()


@simulated_in
async def test_models_that_fit_together_start_at_once_and_each_request_waits_for_its_own(
    folder: Path,
) -> None:
    world = World(folder, dict.fromkeys("abc", Takes(residue=2.0, weights=16.0)))
    await world.down("a", "b", "c")
    begun = len(world.engines.begun)
    tasks = {name: world.ask(name) for name in "abc"}
    for _ in tasks:
        await world.tick()
    assert [name for name, _ in world.engines.begun[begun:]] == ["a", "b", "c"]
    assert list(world.engines.coming) == ["a", "b", "c"]
    for name in "cba":
        assert not tasks[name].done()
        await world.come(name)
        assert (await tasks[name]).model_id == name
    await world.close()


@simulated_in
async def test_of_a_start_counts_what_it_has_not_taken_yet_and_who_does_not_fit_beside_it_waits(
    folder: Path,
) -> None:
    sizes = {
        "a": Takes(weights=30.0),
        "b": Takes(weights=30.0, least=15.0),
        "c": Takes(weights=9.0),
    }
    world = World(folder, sizes)
    await world.down("a", "b", "c")
    tasks = [world.ask("a"), world.ask("b")]
    for _ in range(3):
        await world.tick()
    assert list(world.engines.coming) == ["a", "b"]  # 75 GiB of 80
    world.controller.warm("c")
    await world.tick()
    assert world.waits_for("c") == "it waits for the start of 'a', 'b' on the same device"
    await world.come("b")
    await world.tick()  # its longest request may have none of it yet
    assert list(world.engines.coming) == ["a", "c"]
    for name in "ac":
        await world.come(name)
    for task in tasks:
        (await task).end(Ending.DONE)
    await world.close()


@simulated_in
async def test_nobody_is_stopped_for_what_a_start_on_its_way_may_still_leave(folder: Path) -> None:
    world = World(folder, {"idle": BIG, "a": OTHER, "b": OTHER})
    await world.down("a", "b")
    await world.up("idle")
    tasks = [world.ask("a"), world.ask("b")]
    for _ in range(3):
        await world.tick()
    assert world.states == {"idle": State.WARM, "a": State.STARTING, "b": State.COLD}
    await world.come("a")
    (await tasks[0]).end(Ending.DONE)
    await world.tick()
    assert world.states == {"idle": State.WARM, "a": State.WARM, "b": State.STARTING}
    await world.come("b")
    (await tasks[1]).end(Ending.DONE)
    await world.close()


@pytest.mark.parametrize(
    ("num_cores", "max_starting", "num"), [(2, None, 1), (11, None, 2), (2, 3, 3)]
)
def test_so_many_start_at_a_time_as_there_are_cores_for_or_as_the_file_says(
    num_cores: int, max_starting: int | None, num: int, tmp_path: Path
) -> None:
    @simulated_in
    async def main(folder: Path) -> None:
        devices = dict.fromkeys("abcd", 80.0)
        own = {name: {"devices": (name,)} for name in devices}
        world = World(
            folder,
            dict.fromkeys(devices, Takes()),
            devices=devices,
            settings=own,
            num_cores=num_cores,
        )
        world.fleet.settings = world.settings().model_copy(update={"max_starting": max_starting})
        tasks = [world.ask(name) for name in devices]
        begun = []
        for _ in devices:
            for _ in devices:
                await world.tick()
            begun.append([name for name, _ in world.engines.begun])
            first = next(iter(world.engines.coming))
            if len(begun[-1]) < len(devices):
                assert world.waits_for("d").endswith(f"{num} may start at a time")
            await world.come(first)
        assert begun == [list("abcd")[: num + up] for up in range(len(devices))]
        for task in tasks:
            (await task).end(Ending.DONE)
        await world.close()

    main(tmp_path)


@simulated_in
async def test_six_models_of_eight_billion_on_eighty_gib_come_up_in_two_rounds_and_none_is_stopped(
    folder: Path,
) -> None:
    names = "abcdef"
    sizes = dict.fromkeys(names, Takes(process=2.0, residue=1.0, weights=15.0, least=0.5))
    world = World(folder, sizes, host=126.0, num_cores=16)
    tasks = [world.ask(name) for name in names]
    for num_up, coming in ((0, "abcd"), (4, "ef")):
        for _ in names:
            await world.tick()
        assert list(world.engines.coming) == list(coming)
        for name in coming:
            await world.come(name)
        for task in tasks[num_up : num_up + len(coming)]:
            (await task).end(Ending.DONE)
    assert world.are_up == set(names)
    assert {one.verb for one in world.controller.decisions} == {"start", "wait"}
    await world.close()


@simulated_in
async def test_whoever_asked_first_is_first_where_memory_is_on_its_way(folder: Path) -> None:
    sizes = {"a": Takes(weights=50.0), "large": Takes(weights=50.0), "small": Takes(weights=9.0)}
    world = World(folder, sizes)
    await world.down(*sizes)
    tasks = []
    for name in sizes:
        tasks.append(world.ask(name))
        for _ in range(2):
            await world.tick()
        await asyncio.sleep(1)
    assert list(world.engines.coming) == ["a"]
    assert world.waits_for("large") == "it waits for the start of 'a' on the same device"
    assert world.waits_for("small") == "'large' goes first"
    await world.come("a")
    (await tasks[0]).end(Ending.DONE)
    for _ in range(3):
        await world.tick()
    assert list(world.engines.coming) == ["large", "small"]
    for name, task in (("large", tasks[1]), ("small", tasks[2])):
        await world.come(name)
        (await task).end(Ending.DONE)
    await world.close()


@simulated_in
async def test_whom_no_request_waits_for_any_more_holds_nobody_up(folder: Path) -> None:
    sizes = {"a": Takes(weights=50.0), "large": Takes(weights=50.0), "small": Takes(weights=9.0)}
    world = World(folder, sizes)
    await world.down(*sizes)
    tasks = [world.ask(name) for name in sizes]
    for _ in range(2):
        await world.tick()
    assert world.waits_for("small") == "'large' goes first"
    tasks[1].cancel()
    for _ in range(2):
        await world.tick()
    assert list(world.engines.coming) == ["a", "small"]
    for task in tasks:
        task.cancel()
    await world.close()


@simulated_in
async def test_a_model_keeps_its_place_when_somebody_names_it_and_when_its_start_failed(
    folder: Path,
) -> None:
    world = World(folder, dict.fromkeys("abc", Takes()), num_cores=4)
    tasks = []
    for name in "abc":
        tasks.append(world.ask(name))
        await world.tick()
        await asyncio.sleep(1)
    world.controller.warm("b")
    await world.fail("a", is_out_of_memory=True)
    order = []
    for _ in "abc":
        await world.tick()
        order += list(world.engines.coming)
        await world.come(order[-1])
    assert order == ["a", "b", "c"]
    for task in tasks:
        (await task).end(Ending.DONE)
    await world.close()


@simulated_in
async def test_engines_on_two_devices_start_side_by_side(folder: Path) -> None:
    world = World(
        folder,
        {"a": Takes(), "b": Takes()},
        devices={"one": 80, "two": 80},
        settings={"a": {"devices": ("one",)}, "b": {"devices": ("two",)}},
    )
    tasks = [world.ask("a"), world.ask("b")]
    await world.tick()
    await world.tick()
    assert world.engines.begun == [("a", ("one",)), ("b", ("two",))]
    for name in "ab":
        await world.come(name)
    assert [(await task).model_id for task in tasks] == ["a", "b"]
    await world.close()


@simulated_in
async def test_weights_that_yield_make_room_and_nobody_is_stopped(folder: Path) -> None:
    world = World(folder, dict.fromkeys("abc", Takes(residue=1.0, weights=30.0)))
    await world.up("a", "b", "c")
    assert world.are_up == {"a", "b", "c"}
    assert [decision.verb for decision in world.controller.decisions] == ["start"] * 3
    await world.close()


@simulated_in
async def test_a_start_counts_on_a_gap_between_requests_but_not_where_there_is_none(
    folder: Path,
) -> None:
    world = World(folder, dict.fromkeys("abc", Takes(residue=1.0, weights=35.0)))
    await world.down("c")
    await world.up("a", "b")
    held = [await world.ask("a"), await world.ask("b")]
    await asyncio.sleep(60)
    asked = world.ask("c")
    await world.tick()
    assert world["c"].state is State.COLD
    assert "are missing on gpu" in world.waits_for("c")
    held[0].end(Ending.DONE)
    held[0] = await world.ask("a")
    await world.tick()
    assert world["c"].state is State.STARTING
    await world.come("c")
    for lease in (*held, await asked):
        lease.end(Ending.DONE)
    assert [one.verb for one in world.controller.decisions if one.verb == "stop"] == []
    await world.close()


@simulated_in
async def test_the_victim_is_gone_before_the_start_begins(folder: Path) -> None:
    world = World(folder, dict.fromkeys("abc", BIG))
    await world.up("a", "b")
    world["a"].last_used -= 50  # so it is the cheapest
    for _ in range(3):
        lease = await world.ask("b")
        lease.end(Ending.DONE)
    await world.age()
    asked = world.ask("c")
    world.controller.tick(world.look(), world.clock())
    assert world["a"].state is State.WARM  # told, and not yet begun
    assert not world.engines.coming
    await world.tick()
    await world.tick()
    assert world.states == {"a": State.COLD, "b": State.WARM, "c": State.STARTING}
    await world.come("c")
    (await asked).end(Ending.DONE)
    assert [one.verb for one in world.controller.decisions if one.model_id == "a"] == [
        "start",
        "stop",
    ]
    await world.close()


@simulated_in
async def test_nobody_else_goes_or_starts_while_a_victim_is_still_ending(folder: Path) -> None:
    world = World(folder, dict.fromkeys("abcd", Takes(process=10.0)), host=25.0)
    await world.up_now("a", "b", end_seconds=5.0)
    await world.age()
    tasks = [world.ask("c"), world.ask("d")]
    for _ in range(3):
        await world.tick()
        await asyncio.sleep(1)
    assert sorted(world.states.values()) == ["cold", "cold", "draining", "warm"]
    assert "gave back what they hold" in world.waits_for("c")
    assert not world.engines.coming
    await asyncio.sleep(3)
    await world.tick()
    assert list(world.engines.coming) == ["c"]
    for task in tasks:
        task.cancel()
    await world.close()


@simulated_in
async def test_nobody_else_goes_where_a_victim_ended_during_a_look(folder: Path) -> None:
    for tenths in range(1, 12):
        world = World(folder, dict.fromkeys("abc", Takes(process=10.0)), host=25.0)
        await world.up_now("a", "b", end_seconds=tenths / 10)
        await world.age()
        asked = world.ask("c")
        async with world.running(look_seconds=0.4):
            await asyncio.sleep(5)
        assert sorted(world.states.values()) == ["cold", "starting", "warm"], tenths
        asked.cancel()
        await world.close()


@simulated_in
async def test_nobody_goes_for_what_a_request_had_that_ended_during_a_look(folder: Path) -> None:
    sizes = {"idle": Takes(page=20.0), "a": Takes(page=5.0), "b": Takes(weights=30.0)}
    for tenths in range(1, 12):
        world = World(folder, sizes)
        await world.down("b")
        await world.up("idle", "a")
        held = await world.ask("a")
        world.used = {"a": 40.0}
        async with world.running(look_seconds=0.4):
            await asyncio.sleep(5 + tenths / 10)
            world.used.clear()
            held.end(Ending.DONE)
            asked = world.ask("b")
            await asyncio.sleep(5)
        assert world.states == {"idle": "warm", "a": "warm", "b": "starting"}, tenths
        asked.cancel()
        await world.close()


@simulated_in
async def test_what_an_engine_that_is_being_ended_had_is_not_free_yet(folder: Path) -> None:
    world = World(folder, dict.fromkeys("ab", Takes(process=10.0)), host=15.0)
    await world.up_now("a", end_seconds=5.0)
    world["a"].stop("somebody said so")
    asked = world.ask("b")
    for _ in range(3):
        await world.tick()
    assert world.waits_for("b") == "it waits until 'a' gave back what they hold"
    await asyncio.sleep(6)
    await world.tick()
    assert world["b"].state is State.STARTING
    asked.cancel()
    await world.close()


@simulated_in
async def test_nobody_is_stopped_where_that_would_not_be_enough(folder: Path) -> None:
    world = World(folder, {"a": BIG, "b": BIG, "c": Takes(residue=75.0)})
    await world.down("a", "b")
    await world.down("c")
    await world.up("a", "b")
    lease = await world.ask("b")
    await world.age()
    asked = world.ask("c")
    await world.tick()
    assert world.are_up == {"a", "b"}
    reason = world.waits_for("c")
    assert "nobody is stopped" in reason
    assert "are missing on gpu" in reason
    assert "'b' is busy" in reason
    lease.end(Ending.DONE)
    await world.age()
    for _ in range(3):
        await world.tick()
    assert world.states == {"a": State.COLD, "b": State.COLD, "c": State.STARTING}
    await world.come("c")
    (await asked).end(Ending.DONE)
    await world.close()


@pytest.mark.parametrize(
    ("settings", "up_seconds", "why"),
    [
        ({"pin": True}, 100.0, "'a' is pinned"),
        ({"when_idle": "stay"}, 100.0, "'a' is pinned"),
        ({}, 0.0, "'a' is young"),
        ({}, 30.0, "'a' began to start 35 s ago, less than 60 s"),
    ],
)
def test_pinned_and_young_ones_stay_and_whoever_waits_is_told_so(
    settings: dict[str, object], up_seconds: float, why: str, tmp_path: Path
) -> None:
    @simulated_in
    async def main(folder: Path) -> None:
        world = World(
            folder,
            {"a": Takes(process=10.0), "b": Takes(process=10.0)},
            host=15.0,
            settings={"a": settings, "b": {"max_wait_seconds": 60.0}},
        )
        await world.up("a")
        world["a"].up_at, world["a"].last_start_seconds = world.clock() - up_seconds, 5.0
        asked = world.ask("b")
        await world.tick()
        assert why in world.waits_for("b")
        if settings:
            error = await refused(asked)
            assert (error.status, error.code) == (503, "model_loading")
            assert why in error.message
            assert "host memory" in error.message
        else:
            asked.cancel()
        assert world.are_up == {"a"}
        await world.close()

    main(tmp_path)


@simulated_in
async def test_nobody_goes_for_a_request_whose_client_left(folder: Path) -> None:
    world = World(folder, dict.fromkeys("ab", Takes(process=10.0)), host=15.0)
    await world.up("a")
    asked = world.ask("b")
    await world.settle()
    asked.cancel()
    await world.tick()
    assert world.are_up == {"a"}
    assert world.waits_for("b") == "nobody waits for it any more"
    again = world.ask("b")
    for _ in range(3):
        await world.tick()
    assert world.states == {"a": State.COLD, "b": State.STARTING}
    await world.come("b")
    (await again).end(Ending.DONE)
    await world.close()


@simulated_in
async def test_a_model_whose_requests_are_refused_while_it_loads_starts_all_the_same(
    folder: Path,
) -> None:
    world = World(
        folder,
        dict.fromkeys("ab", Takes(process=10.0)),
        host=15.0,
        settings={"b": {"loading": "refuse"}},
    )
    await world.up("a")
    assert (await refused(world.ask("b"))).code == "model_loading"
    for _ in range(3):
        await world.tick()
    assert world.states == {"a": State.COLD, "b": State.STARTING}
    await world.close()


@simulated_in
async def test_whoever_starts_too_large_for_the_budget_has_the_machine_to_itself(
    folder: Path,
) -> None:
    world = World(folder, dict.fromkeys("ab", Takes(process=20.0)), host=15.0)
    await world.up("a")  # nothing was known of it
    asked = world.ask("b")
    for _ in range(3):
        await world.tick()
    assert world.states == {"a": State.COLD, "b": State.STARTING}
    await world.come("b")
    (await asked).end(Ending.DONE)
    await world.close()


@simulated_in
async def test_a_start_that_found_too_little_memory_has_somebody_stopped_and_is_tried_once_more(
    folder: Path,
) -> None:
    world = World(folder, dict.fromkeys("abc", Takes(process=1.0, residue=1.0)))
    await world.up("a", "b")
    asked = world.ask("c")
    await world.tick()
    await world.fail("c", is_out_of_memory=True)
    assert world["c"].state is State.COLD
    assert not asked.done()
    for _ in range(3):
        await world.tick()
    assert len(world.are_up) == 1  # one of them went, and one was enough
    assert world["c"].state is State.STARTING
    await world.fail("c", is_out_of_memory=True)
    error = await refused(asked)
    assert error.code == "model_failed"
    assert "too little memory again" in error.message
    assert "GiB of host memory" in error.message
    assert len(world.are_up) == 1
    await world.close()


@simulated_in
async def test_a_start_out_of_memory_is_tried_again_at_once_where_nobody_could_go(
    folder: Path,
) -> None:
    world = World(folder, {"a": Takes()})
    asked = world.ask("a")
    await world.tick()
    await world.fail("a", is_out_of_memory=True)
    await world.tick()
    assert world["a"].state is State.STARTING
    await world.come("a")
    assert not world["a"].is_out_of_memory
    (await asked).end(Ending.DONE)
    await world.close()


@simulated_in
async def test_somebody_who_names_a_failed_model_has_it_started(folder: Path) -> None:
    world = World(folder, {"a": Takes()})
    asked = world.ask("a")
    await world.tick()
    await world.fail("a")
    assert (await refused(asked)).code == "model_failed"
    world.controller.warm("a")
    await world.tick()
    assert world["a"].state is State.STARTING
    await world.close()


@simulated_in
async def test_a_model_without_enough_devices_says_so(folder: Path) -> None:
    world = World(folder, {"a": Takes()}, settings={"a": {"tensor_parallel": 2}})
    asked = world.ask("a")
    await world.tick()
    assert world.waits_for("a") == "it needs 2 devices and may have 1"
    asked.cancel()
    await world.close()
