"""What the admin socket sees of the gateway, and what its verbs do to models."""

import asyncio
import threading
from pathlib import Path

import pytest
from helpers.gateway_fleet import Takes, World, simulated_in
from helpers.gateway_line import refused
from helpers.waiting import PATIENCE_SECONDS

from kvcached_core.errors import ConfigError
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.policy import Policy
from kvcached_core.units import GIB
from kvcached_gateway.admin.events import Events
from kvcached_gateway.control.machine import HOST_MEMORY
from kvcached_gateway.control.steering import Gateway
from kvcached_gateway.errors import RefusedVerbError
from kvcached_gateway.lease import Ending, Lease
from kvcached_gateway.settings.config import KvSettings, Settings
from kvcached_gateway.state import State

FAR = {"model": None, "environment": None, "url": "http://127.0.0.1:9"}
ADAPTER = {"model": None, "environment": None, "adapter_of": "a", "path": "/adapter"}


def steered(world: World, folder: Path) -> Gateway:
    return Gateway(world.fleet, world.line, world.controller, folder, world.settings, Events())


async def beside_a_busy_one(folder: Path) -> tuple[World, Gateway, Lease]:
    """Return a world in which `a` is busy, and has the room that `b` would start in."""
    world = World(folder, dict.fromkeys("ab", Takes(residue=60.0)))
    await world.down("b")
    await world.up_now("a")
    return world, steered(world, folder), await world.ask("a")


@simulated_in
async def test_rows_say_what_each_model_does_and_who_waits(folder: Path) -> None:
    world = World(
        folder,
        {"a": Takes(), "b": Takes(), "far": Takes(), "x": Takes()},
        settings={"far": FAR, "x": ADAPTER, "a": {"pin": True}},
    )
    gateway = steered(world, folder)
    await world.up("a")
    held = await world.ask("a")
    waiting = [world.ask("b") for _ in range(2)]
    await world.settle()
    rows = {row.id: row for row in gateway.models()}
    assert list(rows) == ["a", "b", "far", "x"]
    assert (rows["a"].state, rows["a"].num_leases, rows["a"].devices) == ("busy", 1, ("gpu",))
    assert rows["a"].is_pinned
    assert (rows["b"].state, rows["b"].num_waiting) == ("cold", 2)
    assert (rows["x"].state, rows["x"].reason) == ("adapter", "of a")
    assert rows["far"].instance == ""
    await world.tick()
    await world.fail("b")
    for task in waiting:
        await refused(task)
    row = {row.id: row for row in gateway.models()}["b"]
    assert (row.state, row.failure) == ("failed", "it cannot")
    assert 0 < row.retry_seconds <= 5
    held.end(Ending.DONE)
    await world.close()


@simulated_in
async def test_devices_and_the_hosts_memory_say_who_is_there(folder: Path) -> None:
    world = World(folder, {"a": Takes(process=2.0, residue=10.0), "b": Takes()}, host=20.0)
    gateway = steered(world, folder)
    assert gateway.devices() == []
    await world.up("a")
    await world.tick()
    gpu, host = gateway.devices()
    assert (gpu.id, gpu.capacity_bytes, gpu.models) == ("gpu", 80 * GIB, ("a",))
    assert gpu.free_bytes == 70 * GIB
    assert (host.id, host.capacity_bytes, host.models) == (HOST_MEMORY, 20 * GIB, ("a",))
    assert host.free_bytes == 18 * GIB
    await world.close()


@simulated_in
async def test_models_in_use_are_those_that_are_not_cold_or_are_waited_for(folder: Path) -> None:
    world = World(folder, {"a": Takes(), "b": Takes(), "c": Takes()})
    gateway = steered(world, folder)
    assert gateway.models_in_use() == []
    await world.up("a")
    asking = world.ask("b")
    await world.settle()
    assert [(row.id, row.num_waiting) for row in gateway.models_in_use()] == [("a", 0), ("b", 1)]
    asking.cancel()
    await world.close()


@simulated_in
async def test_verbs_do_what_they_say_and_refuse_what_makes_no_sense(folder: Path) -> None:
    world = World(
        folder,
        {"a": Takes(), "far": Takes(), "x": Takes()},
        settings={"far": FAR, "x": ADAPTER},
    )
    gateway = steered(world, folder)
    assert "on its way" in await gateway.steer("a", "warm")
    await world.tick()
    assert world["a"].state is State.STARTING
    with pytest.raises(RefusedVerbError, match="'a' is starting; only one that is up can yield"):
        await gateway.steer("a", "sleep")
    await world.come("a")
    await gateway.settled("a")
    await gateway.settled("x")
    await gateway.steer("a", "pin")
    assert world.controller.is_pinned(world["a"])
    await gateway.steer("a", "unpin")
    assert not world.controller.is_pinned(world["a"])
    assert "ends when its 0 requests are done" in await gateway.steer("a", "stop")
    await world.settle()
    assert world["a"].state is State.COLD
    with pytest.raises(RefusedVerbError, match="'x' is an adapter of 'a'; stop that one"):
        await gateway.steer("x", "stop")
    with pytest.raises(RefusedVerbError, match="served elsewhere"):
        await gateway.steer("far", "stop")
    with pytest.raises(KeyError):
        await gateway.steer("gone", "warm")
    assert (await gateway.explain("x")).startswith("x is an adapter of a\n")
    assert [one.verb for one in gateway.decisions()] == ["start"]
    await world.close()


@simulated_in
async def test_a_stop_takes_back_an_order_and_no_request_that_waits(folder: Path) -> None:
    world, gateway, held = await beside_a_busy_one(folder)
    await gateway.steer("b", "warm")
    await world.tick()
    assert "'a' is busy" in world.waits_for("b")
    await gateway.steer("b", "stop")
    assert world.waits_for("b") == ""
    held.end(Ending.DONE)
    await world.tick()
    await world.tick()
    assert world.states == {"a": State.WARM, "b": State.COLD}
    held = await world.ask("a")
    asked = world.ask("b")
    await world.settle()
    await gateway.steer("b", "warm")
    await gateway.steer("b", "stop")
    await world.tick()
    assert "'a' is busy" in world.waits_for("b")
    asked.cancel()
    held.end(Ending.DONE)
    await world.close()


@simulated_in
async def test_who_is_refused_after_a_stop_has_the_model_started_anew(folder: Path) -> None:
    world, gateway, held = await beside_a_busy_one(folder)
    world.more["b"]["loading"] = "refuse"
    world.fleet.reload(world.settings())
    assert (await refused(world.ask("b"))).code == "model_loading"
    await world.tick()
    await gateway.steer("b", "stop")
    assert world.waits_for("b") == ""
    assert (await refused(world.ask("b"))).code == "model_loading"
    await world.tick()
    assert "'a' is busy" in world.waits_for("b")
    held.end(Ending.DONE)
    await world.close()


@simulated_in
async def test_to_drain_is_to_take_nothing_new_and_to_end(folder: Path) -> None:
    world = World(folder, {"a": Takes()})
    gateway = steered(world, folder)
    assert not gateway.about().is_draining
    gateway.drain()
    assert gateway.about().is_draining
    await gateway.drained.wait()
    await world.close()


def test_a_reload_tells_engines_that_run_what_is_theirs_now_and_says_what_was_refused(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        world = World(tmp_path, {"a": Takes(), "b": Takes()})
        gateway = steered(world, tmp_path)
        await world.up_now("a")
        world.more["a"]["kv"] = KvSettings(limit=GIB, floor=GIB // 2, priority=3)
        waiting = world.ask("b")
        await world.settle()
        del world.more["b"]
        text = await gateway.reload()
        assert "removed b" in text
        assert "no instance is named 'a'" in text  # there is no engine behind it
        assert (await refused(waiting)).code == "model_not_found"
        assert world["a"].settings.kv.priority == 3
        await world.close()

    asyncio.run(main())


def test_a_reload_says_once_which_ledger_cannot_be_read_and_changes_what_can(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        world = World(tmp_path, {"a": Takes()})
        gateway = steered(world, tmp_path)
        await world.up_now("a")
        world.more["a"]["kv"] = KvSettings(limit=GIB, priority=3)
        (tmp_path / "GPU-1.ledger").write_bytes(b"nonsense")
        with Ledger(tmp_path / "host.ledger", 2 * GIB) as ledger:
            ledger.register(name="a", engine="test")
            text = await gateway.reload()
            assert ledger.view().instances[0].policy == Policy(limit_bytes=GIB, priority=3)
        assert text.count("GPU-1.ledger is damaged") == 1
        await world.close()

    asyncio.run(main())


def test_whoever_goes_by_the_rules_is_told_of_new_ones_once_they_hold(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path, {"a": Takes(), "b": Takes()})
        gateway = steered(world, tmp_path)
        told: list[tuple[list[str], bool]] = []
        gateway.on_rules.append(
            lambda: told.append((list(world.fleet.settings.models), gateway.is_draining))
        )
        del world.more["b"]
        await gateway.reload()
        gateway.drain()
        assert told == [(["a"], False), (["a"], True)]
        await world.close()

    asyncio.run(main())


def test_a_file_with_a_mistake_changes_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path, {"a": Takes()})

        def broken() -> Settings:
            raise ConfigError("models.yaml: line 3: no")

        gateway = Gateway(world.fleet, world.line, world.controller, tmp_path, broken, Events())
        before = world.fleet.settings
        with pytest.raises(ConfigError, match="line 3"):
            await gateway.reload()
        assert world.fleet.settings is before
        await world.close()

    asyncio.run(main())


def test_of_two_reloads_at_once_the_file_that_was_read_last_holds(tmp_path: Path) -> None:
    async def run() -> None:
        world = World(tmp_path, {"a": Takes()})
        files = [world.settings().model_copy(update={"max_body_bytes": size}) for size in (1, 2)]
        began, may_go_on = threading.Event(), threading.Event()

        def read() -> Settings:
            file = files.pop(0)
            if file.max_body_bytes == 1:
                began.set()
                may_go_on.wait(PATIENCE_SECONDS)
            return file

        gateway = Gateway(world.fleet, world.line, world.controller, tmp_path, read, Events())
        first = asyncio.create_task(gateway.reload())
        await asyncio.to_thread(began.wait, PATIENCE_SECONDS)
        second = asyncio.create_task(gateway.reload())
        await asyncio.wait([second], timeout=0.2)  # it may not end before the first
        may_go_on.set()
        await asyncio.gather(first, second)
        assert world.fleet.settings.max_body_bytes == 2
        await world.close()

    asyncio.run(run())
