"""What the controller does at each look, beside starts: states, idle limits, pins, reasons."""

import asyncio
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.gateway_fleet import Takes, World, simulated_in
from helpers.gateway_line import refused

from kvcached_core.errors import BackendError, LedgerError
from kvcached_core.units import GIB
from kvcached_gateway.control.controller import TICK_SECONDS
from kvcached_gateway.control.decisions import NUM_KEPT, Decisions
from kvcached_gateway.control.machine import MachineView
from kvcached_gateway.lease import Ending
from kvcached_gateway.state import State


@contextmanager
def written_warnings() -> Iterator[list[str]]:
    """Collect what the controller warns of."""
    written: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: written.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("kvcached_gateway.control.controller")
    logger.addHandler(handler)
    try:
        yield written
    finally:
        logger.removeHandler(handler)


@simulated_in
async def test_a_model_is_yielded_as_long_as_the_ledger_says_so(folder: Path) -> None:
    world = World(folder, {"a": Takes(weights=10.0)})
    await world.up("a")
    world.yielded.add("a")
    await world.tick()
    assert world["a"].state is State.YIELDED
    world.yielded.clear()
    await world.tick()
    assert world["a"].state is State.WARM
    await world.close()


@simulated_in
async def test_one_that_nobody_asked_for_its_idle_limit_ends_unless_it_is_pinned(
    folder: Path,
) -> None:
    limit = {"idle_limit_seconds": 300.0}
    world = World(
        folder, dict.fromkeys("abc", Takes()), settings={"a": limit, "b": limit | {"pin": True}}
    )
    await world.up("a", "b", "c")
    held = await world.ask("a")
    await asyncio.sleep(400)
    await world.tick()
    assert world.are_up == {"a", "b", "c"}
    held.end(Ending.DONE)
    await asyncio.sleep(290)
    await world.tick()
    assert world.are_up == {"a", "b", "c"}
    await asyncio.sleep(20)
    await world.tick()
    assert world.are_up == {"b", "c"}
    assert "its idle_limit is 300" in world["a"].reason
    world.controller.pin("b", is_pinned=False)
    await world.tick()
    assert world.are_up == {"c"}
    await world.close()


@simulated_in
async def test_what_a_start_has_already_is_not_taken_for_its_neighbours(folder: Path) -> None:
    world = World(folder, {"a": Takes(residue=2.0), "b": Takes(residue=9.0)})
    await world.up("a")
    asked = world.ask("b")
    await world.tick()
    world.others_bytes = 9 * GIB
    await world.tick()
    assert world.controller._sizes.of("a").residue_bytes == 2 * GIB
    world.others_bytes = 0
    asked.cancel()
    await world.close()


@simulated_in
async def test_a_pin_holds_whatever_the_file_says(folder: Path) -> None:
    world = World(folder, dict.fromkeys("ab", Takes(process=10.0)), host=15.0)
    await world.up("a")
    world.controller.pin("a", is_pinned=True)
    asked = world.ask("b")
    await world.tick()
    assert "'a' is pinned" in world.waits_for("b")
    world.controller.pin("a", is_pinned=False)
    for _ in range(3):
        await world.tick()
    assert world["b"].state is State.STARTING
    await world.come("b")
    (await asked).end(Ending.DONE)
    await world.close()


@simulated_in
async def test_it_says_why_a_model_is_where_it_is_and_who_would_go(folder: Path) -> None:
    world = World(folder, dict.fromkeys("ab", Takes(process=10.0)), host=15.0)
    await world.up("a")
    world.controller.pin("a", is_pinned=True)
    asked = world.ask("b")
    await world.tick()
    text = world.controller.explain("b")
    assert "b is cold" in text
    assert "it waits: nobody is stopped" in text
    text = world.controller.explain("a")
    assert "a is warm" in text
    assert "on gpu" in text
    assert "who would be stopped first for another model: nobody; it is pinned" in text
    assert "start: a request waits for it" in text
    with pytest.raises(KeyError):
        world.controller.explain("gone")
    asked.cancel()
    world.controller.pin("a", is_pinned=False)
    assert "who would be stopped first for another model: it\n" in world.controller.explain("a")
    await world.close()


@simulated_in
async def test_it_decides_at_once_when_somebody_wants_something_and_else_now_and_then(
    folder: Path,
) -> None:
    world = World(folder, {"a": Takes()})
    num_looks: Counter[str] = Counter()
    see = world.look

    async def look() -> MachineView:
        num_looks["all"] += 1
        if num_looks["all"] == 2:
            raise LedgerError("the ledger is broken")
        if num_looks["all"] == 3:
            raise ZeroDivisionError
        return see()

    world.controller._look = look
    running = asyncio.ensure_future(world.controller.run())
    await asyncio.sleep(TICK_SECONDS * 4.5)
    assert num_looks["all"] == 5  # a look that failed was not the last
    asked = world.ask("a")
    await world.settle()
    assert world["a"].state is State.STARTING
    settled = asyncio.ensure_future(world.controller.settled("a"))
    await asyncio.sleep(1)
    assert not settled.done()
    await world.come("a")
    await settled
    (await asked).end(Ending.DONE)
    running.cancel()
    await world.close()


@simulated_in
async def test_where_nothing_can_be_seen_nothing_starts_and_whoever_is_up_serves(
    folder: Path,
) -> None:
    world = World(folder, {"a": Takes(), "b": Takes()})
    await world.up("a")
    see, is_lost = world.look, True

    async def look() -> MachineView:
        if is_lost:
            raise BackendError("nvmlDeviceGetMemoryInfo", "the GPU is lost", 15)
        return replace(see(), problems=("a ledger is broken",))

    world.controller._look = look
    running = asyncio.ensure_future(world.controller.run())
    with written_warnings() as written:
        asked = world.ask("b")
        await asyncio.sleep(TICK_SECONDS * 5)
        (await world.ask("a")).end(Ending.DONE)
        assert world.engines.begun == [("a", ("gpu",))]
        assert "so nothing starts" in world.controller.explain("a")
        error = await refused(asked)
        assert (error.status, error.code) == (503, "model_loading")
        assert "cannot be looked at, so nothing starts" in error.message
        assert "the GPU is lost" in error.message
        is_lost = False
        asked = world.ask("b")
        await asyncio.sleep(TICK_SECONDS * 5)
    await world.come("b")
    (await asked).end(Ending.DONE)
    assert "nothing starts" not in world.controller.explain("a")
    assert [text.partition(",")[0] for text in written] == [
        "the machine cannot be looked at",
        "a ledger is broken",
    ]
    running.cancel()
    await world.close()


def test_a_wait_is_one_decision_as_long_as_its_reason_is_the_same() -> None:
    decisions = Decisions(lambda: 7.0)
    told: list[str] = []
    decisions.on_add.append(lambda one: told.append(one.reason))
    for reason in ("no room", "no room", "a start", "no room"):
        decisions.add("a", "wait", reason)
    assert told == ["no room", "a start", "no room"]
    assert decisions.hindrance("a") == "no room"
    decisions.add("a", "start", "there is room")
    assert decisions.hindrance("a") == ""
    decisions.add("b", "wait", "no room", missing={"gpu": 5})
    decisions.forget_wait("b")
    assert decisions.hindrance("b") == ""
    assert [one.inputs for one in decisions.of("b")] == [{"missing": {"gpu": 5}}]
    assert decisions.of("a")[-1].at == 7.0


def test_the_last_decisions_are_kept() -> None:
    decisions = Decisions(lambda: 0.0)
    for number in range(NUM_KEPT + 5):
        decisions.add("a", "start", str(number))
    assert [one.reason for one in decisions][:2] == ["5", "6"]
    assert len(list(decisions)) == NUM_KEPT


@simulated_in
async def test_a_request_that_comes_or_goes_is_nothing_to_decide_at_once_unless_one_waits(
    folder: Path,
) -> None:
    world = World(folder, {"a": Takes(), "b": Takes()})
    await world.up("a")
    news = world.controller._news
    news.clear()
    lease = await world.ask("a")
    assert not news.is_set()
    waiting = world.ask("b")
    await world.settle()
    news.clear()
    lease.end(Ending.DONE)
    assert news.is_set()
    waiting.cancel()
    await world.close()
