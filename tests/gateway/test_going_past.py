"""Requests that wait for their adapter hold up only those that wait for the same."""

import pytest
from helpers.gateway_line import World, refused, settle, simulated
from helpers.gateway_models import FakeGrantor

from kvcached_gateway.settings.config import ModelSettings, ServiceClass


def world_of(*, has_goals: bool, **more: int) -> World:
    """Make a world with a model, an adapter of it that is not loaded, and another model beside."""
    world = World(FakeGrantor("a", absent="x", **more), FakeGrantor("b"))
    goal = {"class_name": "strict"} if has_goals else {}
    adapters = [ModelSettings(id=name, adapter_of="a", **goal) for name in "xy"]  # type: ignore[arg-type]
    models = [ModelSettings(id=name, **goal) for name in "ab"]  # type: ignore[arg-type]
    world.set_settings(*models, *adapters, strict=ServiceClass(name="strict", ttft=1.0))
    return world


@pytest.mark.parametrize("has_goals", [False, True])
def test_the_models_own_requests_go_past_and_an_adapters_stay_in_turn(*, has_goals: bool) -> None:
    @simulated
    async def run() -> None:
        world = world_of(has_goals=has_goals)
        model = world.models["a"]
        waiting = [world.start(name, key=f"{name}{number}") for number in range(2) for name in "xy"]
        await settle()
        own = [world.start("a", key=f"a{number}") for number in range(2)]
        beside = world.start("b")
        await settle()
        assert [one.key for one in model.granted] == ["a0", "a1"]
        assert all(task.done() for task in (*own, beside))
        assert not any(task.done() for task in waiting)
        model.absent = ""
        world.line.changed("a")
        await settle()
        assert [one.key for one in model.granted] == ["a0", "a1", "x0", "y0", "x1", "y1"]

    run()


@pytest.mark.parametrize("has_goals", [False, True])
def test_nobody_goes_past_one_that_waits_for_a_place(*, has_goals: bool) -> None:
    @simulated
    async def run() -> None:
        world = world_of(has_goals=has_goals, max_concurrent=1)
        model = world.models["a"]
        model.absent = ""
        held = world.start("a", key="held")
        await settle()
        waiting = [world.start(name, key=name) for name in ("x", "a")]
        await settle()
        assert [one.key for one in model.granted] == ["held"]
        world.end("a")
        await settle()
        assert [one.key for one in model.granted] == ["held", "x"]
        world.end("a")
        await settle()
        assert all(task.done() for task in (held, *waiting))

    run()


@pytest.mark.parametrize("has_goals", [False, True])
@pytest.mark.parametrize("is_cancelled", [False, True])
def test_who_waited_behind_one_that_left_is_served_at_once(
    *, has_goals: bool, is_cancelled: bool
) -> None:
    @simulated
    async def run() -> None:
        world = world_of(has_goals=has_goals)
        leaving = world.start("x", deadline_seconds=1.0)
        await settle()
        behind = world.start("y", key="y")
        await settle()
        assert not behind.done()
        if is_cancelled:
            leaving.cancel()
        else:
            assert (await refused(leaving)).code == "deadline"
        await settle()
        assert [one.key for one in world.models["a"].granted] == ["y"]

    run()
