"""The line where classes have goals: turns among all that wait for the same devices."""

import asyncio

import pytest
from helpers.gateway_line import World, refused, settle, simulated
from helpers.gateway_models import FakeGrantor

from kvcached_gateway.lease import Ending
from kvcached_gateway.line.grantor import Readiness
from kvcached_gateway.settings.config import ModelSettings, ServiceClass

CHUNK_BYTES = 2_048 * 4  # as long as no tokens were counted, four bytes are one
STRICT = ServiceClass(name="strict", ttft_seconds=1.0)
LOOSE = ServiceClass(name="loose", ttft_seconds=60.0)
PICKY = ServiceClass(name="picky", ttft_seconds=1.0, late="refuse")


def classed(*models: FakeGrantor, **settings: object) -> World:
    """Make a world whose model a is strict, b loose and c without a class."""
    world = World(*models)
    names = {"a": "strict", "b": "loose", "c": None}
    world.set_settings(
        *(ModelSettings(id=name, class_name=of, **settings) for name, of in names.items()),  # type: ignore[arg-type]
        strict=STRICT,
        loose=LOOSE,
        picky=PICKY,
    )
    return world


def granted(world: World, model: str) -> list[str | None]:
    return [one.key for one in world.models[model].granted]


@simulated
async def test_without_a_class_an_engine_gets_all_that_come_and_its_own_leases() -> None:
    world = World(FakeGrantor("a"))
    leases = [await world.start(body_bytes=10 * CHUNK_BYTES) for _ in range(50)]
    assert leases == world.models["a"].leases


@simulated
async def test_where_nobody_has_a_goal_nothing_happens_whatever_classes_there_are() -> None:
    world = classed(FakeGrantor("c"), FakeGrantor("a", devices=("other",)))
    await world.start("a")
    leases = [await world.start("c", body_bytes=10 * CHUNK_BYTES) for _ in range(50)]
    assert leases == world.models["c"].leases


@simulated
async def test_a_model_that_holds_back_holds_up_nobody_else() -> None:
    world = classed(FakeGrantor("a"), FakeGrantor("b"))
    world.held["a"] = "it is another one's turn"
    waiting = world.start("a", key="first")
    await settle()
    await world.start("b")
    assert not waiting.done()
    world.held.clear()
    world.line.changed("a")
    assert (await waiting).model_id == "a"


@simulated
async def test_an_engine_has_two_chunks_to_read_and_the_rest_waits() -> None:
    world = classed(FakeGrantor("a"), FakeGrantor("b"))
    tasks = [world.start("a", key=str(n), body_bytes=CHUNK_BYTES) for n in range(5)]
    await settle()
    assert granted(world, "a") == ["0", "1"]
    assert world.line.waiting("a") == 3
    tasks[0].result().first_byte()
    tasks[0].result().first_byte()
    await settle()
    assert granted(world, "a") == ["0", "1", "2"]
    tasks[1].result().end(Ending.CANCELLED)
    tasks[1].result().end(Ending.DONE)
    await settle()
    assert granted(world, "a") == ["0", "1", "2", "3"]
    for task in tasks[2:]:
        (await task).first_byte()
    await asyncio.gather(*tasks)


@simulated
async def test_the_strict_go_before_the_loose_on_their_devices_and_nowhere_else() -> None:
    world = classed(FakeGrantor("a"), FakeGrantor("b"), FakeGrantor("c", devices=("other",)))
    loose = [world.start("b", key=f"loose {n}", body_bytes=2 * CHUNK_BYTES) for n in range(4)]
    await settle()
    strict = [world.start("a", key=f"strict {n}", body_bytes=2 * CHUNK_BYTES) for n in range(2)]
    beside = [world.start("c", body_bytes=2 * CHUNK_BYTES) for _ in range(3)]
    await settle()
    assert all(task.done() for task in beside)
    assert granted(world, "b") == ["loose 0"]
    assert not granted(world, "a")
    loose[0].result().first_byte()
    await settle()
    assert granted(world, "a") == ["strict 0"]
    strict[0].result().first_byte()
    await settle()
    strict[1].result().first_byte()
    await settle()
    assert granted(world, "b") == ["loose 0", "loose 1"]
    for task in loose[1:]:
        (await task).first_byte()


@simulated
async def test_the_class_of_a_key_counts_before_that_of_the_model() -> None:
    world = classed(FakeGrantor("b"))
    first = world.start("b", body_bytes=2 * CHUNK_BYTES)
    second = world.start("b", body_bytes=2 * CHUNK_BYTES)
    strict = world.start("b", body_bytes=2 * CHUNK_BYTES, class_name="strict")
    await settle()
    (await first).first_byte()
    await settle()
    assert strict.done()
    assert not second.done()
    strict.result().first_byte()
    await second


async def measured(world: World, model: str, body_bytes: int, seconds: float) -> None:
    """Let the line learn how fast a model reads."""
    lease = await world.start(model, body_bytes=body_bytes)
    await asyncio.sleep(seconds)
    lease.first_byte()
    lease.end(Ending.DONE)


@simulated
async def test_how_fast_an_engine_reads_is_measured_where_it_reads_alone() -> None:
    world = classed(FakeGrantor("a"), FakeGrantor("b"))
    await measured(world, "a", 4_000, 0.5)
    assert world.line.demand("a").reading_seconds(8_000) == pytest.approx(1.0)
    both = [await world.start(name, body_bytes=10) for name in "ab"]
    await asyncio.sleep(9)
    for lease in both:
        lease.first_byte()
    assert world.line.demand("a").reading_seconds(8_000) == pytest.approx(1.0)
    assert world.line.demand("b").reading_seconds(8_000) == 0


@simulated
async def test_the_late_go_behind_those_in_time_or_are_refused_as_their_class_says() -> None:
    world = classed(FakeGrantor("a"))
    late: list[str] = []
    world.line.on_late.append(late.append)
    await measured(world, "a", CHUNK_BYTES, 0.4)
    held = await world.start("a", body_bytes=2 * CHUNK_BYTES)
    long = world.start("a", key="long", body_bytes=3 * CHUNK_BYTES)
    short = world.start("a", key="short", body_bytes=2 * CHUNK_BYTES)
    picky = world.start("a", body_bytes=4 * CHUNK_BYTES, class_name="picky")
    error = await refused(picky)
    assert (error.status, error.code) == (503, "late")
    assert "needs 1.60 s of the 1.00 s to its goal" in error.message
    assert error.retry_after_seconds
    held.first_byte()
    await settle()
    assert short.done()
    assert not long.done()
    short.result().first_byte()
    await long
    assert late == ["a", "a"]  # long and picky, once each


@simulated
async def test_nobody_starves_however_many_go_before_it() -> None:
    world = classed(FakeGrantor("a"), FakeGrantor("b"), max_wait_seconds=100)
    held = await world.start("a", body_bytes=2 * CHUNK_BYTES)
    loose = world.start("b", body_bytes=2 * CHUNK_BYTES)
    for _ in range(140):
        coming = world.start("a", body_bytes=2 * CHUNK_BYTES)
        await asyncio.sleep(0.5)
        held.first_byte()
        held.end(Ending.DONE)
        await settle()
        if loose.done():
            break
        held = await coming
    assert 50 <= loose.result().waited_seconds <= 52
    loose.result().first_byte()
    await coming


@simulated
async def test_a_prompt_that_stalls_holds_up_its_own_model_alone() -> None:
    world = classed(FakeGrantor("a"), FakeGrantor("b"))
    stalled = await world.start("b", body_bytes=2 * CHUNK_BYTES)
    own = world.start("b", body_bytes=CHUNK_BYTES)
    other = world.start("a", body_bytes=CHUNK_BYTES)
    await asyncio.sleep(0.9)
    assert not other.done()
    await asyncio.sleep(0.2)
    assert other.done()
    assert not own.done()
    stalled.first_byte()
    await own


@simulated
async def test_a_request_whose_engine_died_goes_first() -> None:
    world = classed(FakeGrantor("a"), FakeGrantor("b"))
    held = await world.start("a", body_bytes=2 * CHUNK_BYTES)
    strict = world.start("a", body_bytes=2 * CHUNK_BYTES)
    again = world.start("b", body_bytes=2 * CHUNK_BYTES, is_again=True)
    await settle()
    held.first_byte()
    await settle()
    assert again.done()
    assert not strict.done()
    again.result().first_byte()
    await strict


@simulated
async def test_a_cold_model_is_wanted_once_and_its_line_keeps_goals_where_it_comes_up() -> None:
    world = classed(FakeGrantor("a", Readiness.COLD, devices=(), start_seconds=30))
    tasks = [world.start("a", key=str(n), body_bytes=CHUNK_BYTES) for n in range(5)]
    await settle()
    assert world.wanted == ["a"]
    world.models["a"].devices = ("gpu",)
    world.set("a", Readiness.COMING)
    await asyncio.sleep(30)
    world.set("a", Readiness.UP)
    await settle()
    assert granted(world, "a") == ["0", "1"]
    for task in tasks:
        (await task).first_byte()
    assert world.wanted == ["a"]


@simulated
async def test_a_model_that_takes_nothing_does_not_hold_up_its_neighbours() -> None:
    world = classed(FakeGrantor("a", Readiness.COMING), FakeGrantor("b"))
    strict = world.start("a")
    await settle()
    await world.start("b")
    world.set("a", Readiness.UP)
    await strict


@simulated
async def test_who_leaves_while_it_waits_for_its_turn_leaves_no_trace() -> None:
    world = classed(FakeGrantor("a"))
    held = await world.start("a", body_bytes=2 * CHUNK_BYTES)
    tasks = [world.start("a", key=str(n), body_bytes=2 * CHUNK_BYTES) for n in range(3)]
    await settle()
    tasks[0].cancel()
    held.first_byte()
    await asyncio.sleep(0)
    assert world.models["a"].granted[-1].key == "1"
    tasks[1].cancel()  # its lease came, and its task has not gone on
    await settle()
    assert tasks[1].cancelled()
    lease = await tasks[2]
    lease.first_byte()
    lease.end(Ending.DONE)
    held.end(Ending.DONE)
    assert not world.models["a"].leases
    assert not world.line.waiting("a")
    await world.start("a", body_bytes=2 * CHUNK_BYTES)


@simulated
async def test_when_the_classes_go_from_the_file_all_go_as_they_came() -> None:
    world = classed(FakeGrantor("a"))
    held = await world.start("a", body_bytes=2 * CHUNK_BYTES)
    tasks = [world.start("a", key=str(n), body_bytes=2 * CHUNK_BYTES) for n in range(3)]
    await settle()
    world.set_settings(ModelSettings(id="a"))
    world.line.changed("a")
    await asyncio.gather(*tasks)
    assert granted(world, "a") == [None, "0", "1", "2"]
    held.first_byte()
    assert await world.start("a") in world.models["a"].leases
