"""When a model is tried again, what its requests waited for, and which adapters it has."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from helpers.gateway_clock import run_simulated
from helpers.gateway_ledger import row
from helpers.gateway_runner import TOKEN, FakeEngine, FakeRunner, record_of

from kvcached_gateway.errors import AdoptionError, EngineStartError
from kvcached_gateway.lease import Ask, Ending, Woken
from kvcached_gateway.line.line import Readiness
from kvcached_gateway.models.held_leases import CLOSE_SECONDS, ModelLease
from kvcached_gateway.models.model import Model, State
from kvcached_gateway.settings.config import ModelSettings

HOST = ("host",)
ADAPTERS = {"x": "/x", "y": "/y", "z": "/z", "lost": "missing"}


class World:
    """One model over a runner without engines."""

    def __init__(self, adapters: dict[str, str] | None = None, **settings: Any) -> None:
        self.runner = FakeRunner()
        self.model = Model(ModelSettings(id="a", model="m", **settings), self.runner, adapters)
        self.told: list[str] = []
        self.num_lease_news = 0
        self.model.on_change.append(lambda _model, _old, new, _why: self.told.append(new))
        self.model.on_lease.append(lambda _model: self._count())

    def _count(self) -> None:
        self.num_lease_news += 1

    async def up(self, seconds: float = 0.0) -> FakeEngine:
        self.model.start(HOST, "a test wants it")
        await turn()
        await asyncio.sleep(seconds)
        engine = self.runner.succeed()
        await turn()
        return engine

    def ask(self, name: str = "a", waited: float = 0.0) -> ModelLease | None:
        return self.model.grant(Ask(name, "/v1/completions", 10), waited)

    def take(self, name: str = "a", waited: float = 0.0) -> ModelLease:
        lease = self.ask(name, waited)
        assert lease is not None
        return lease


async def turn() -> None:
    for _ in range(30):
        await asyncio.sleep(0)


def simulated(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    """Run a test on a loop whose time costs nothing."""

    def run() -> None:
        run_simulated(test)

    run.__name__ = test.__name__
    return run


@simulated
async def test_a_failed_start_is_tried_again_later_each_time() -> None:
    world = World()
    model = world.model
    for seconds in (5.0, 15.0, 60.0, 300.0, 300.0):
        model.start(HOST, "a request waits")
        await turn()
        world.runner.fail(EngineStartError("no such file"))
        await turn()
        assert model.state is State.FAILED
        assert not model.is_out_of_memory
        refusal = model.refusal()
        assert refusal is not None
        assert (refusal.status, refusal.code) == (503, "model_failed")
        assert "no such file" in refusal.message
        assert refusal.retry_after_seconds == pytest.approx(seconds)
        await asyncio.sleep(seconds - 0.1)
        assert model.state is State.FAILED
        await asyncio.sleep(0.2)
        assert model.state is State.COLD
        assert model.readiness is Readiness.COLD
    engine = await world.up()
    assert (model.failure, model.num_starts) == ("", 6)
    world.take().end(Ending.DONE)
    engine.crashed.set()
    await turn()
    assert model.state is State.COLD  # it served, so it is tried again at once
    await model.close(is_kept=False)


@simulated
async def test_an_engine_that_dies_twice_and_serves_nobody_fails_its_model() -> None:
    world = World()
    for state in (State.COLD, State.FAILED):
        engine = await world.up()
        lease = world.take()
        engine.crashed.set()
        await turn()
        assert world.model.state is state
        assert not lease.is_held
        lease.end(Ending.DIED_BEFORE)
    assert "its engine ended by itself: ended with 0" in world.model.failure
    await world.model.close(is_kept=False)


@simulated
async def test_a_start_that_found_too_little_memory_fails_the_second_time_in_a_row() -> None:
    world = World()
    model = world.model
    for reason, state in (
        ("a request waits", State.COLD),
        ("5 GiB are needed, 4 GiB are free", State.FAILED),
        ("again", State.FAILED),
    ):
        model.start(HOST, reason)
        await turn()
        world.runner.fail(EngineStartError("no room for its cache", is_out_of_memory=True))
        await turn()
        assert model.state is state
        assert model.is_out_of_memory
        assert "no room for its cache" in model.reason
        if state is State.FAILED:
            assert reason in model.failure
    await world.up()
    assert (model.failure, model.is_out_of_memory) == ("", False)
    await model.close(is_kept=False)


@simulated
async def test_a_failed_model_starts_at_once_for_whoever_asks_by_name() -> None:
    world = World()
    world.model.start(HOST, "a request waits")
    await turn()
    world.runner.fail(EngineStartError("no room\nIts log ends with:\n/a/path"))
    await turn()
    refusal = world.model.refusal()
    assert refusal is not None
    assert refusal.message == "'a': no room"
    assert "/a/path" in world.model.failure
    await world.up()
    assert world.model.state is State.WARM
    await world.model.close(is_kept=False)


@simulated
async def test_a_known_answer_is_asked_for_again_until_a_start_fails() -> None:
    world = World()
    await world.up()
    world.model.stop("a test wants it")
    await turn()
    world.model.start(HOST, "again")
    await turn()
    world.runner.fail(EngineStartError("its weights are not what they were"))
    await turn()
    await world.up()
    assert world.runner.tokens == ["", TOKEN, ""]
    await world.model.close(is_kept=False)


@simulated
async def test_a_lease_says_what_its_request_waited_for() -> None:
    world = World()
    arrival = asyncio.get_running_loop().time()
    await world.up(seconds=20.0)
    now = asyncio.get_running_loop().time()
    assert world.model.start_seconds == pytest.approx(20.0)
    assert world.take(waited=now - arrival).woken is Woken.START
    assert world.take().woken is Woken.NONE
    await asyncio.sleep(10)
    late = world.take(waited=5.0)
    assert late.woken is Woken.NONE  # it waited for others, not for the start
    world.model.leases.revoke()
    world.model.go(State.WARM, "a test wants it")
    world.model.observed(row(weights_bytes=2, weights_needed_bytes=8))
    assert world.model.state is State.YIELDED
    assert world.model.readiness is Readiness.UP
    lease = world.take()
    assert (lease.woken, world.model.state) == (Woken.WAKE, State.BUSY)
    world.model.observed(row(weights_bytes=8, weights_needed_bytes=8))
    lease.end(Ending.DONE)
    assert world.model.state is State.WARM
    await world.model.close(is_kept=False)


@simulated
async def test_no_more_than_max_concurrent_are_granted_and_each_end_is_told() -> None:
    world = World(max_concurrent=2)
    await world.up()
    first, second = world.take(), world.take()
    assert world.ask() is None
    first.first_byte()
    first.first_byte()
    first.end(Ending.CANCELLED)
    first.end(Ending.DONE)
    assert world.num_lease_news == 2
    assert world.model.num_leases == 1
    assert world.take() is not second
    await world.model.close(is_kept=False)


@simulated
async def test_one_that_was_told_to_end_gives_no_lease_before_it_has_noticed() -> None:
    world = World()
    await world.up()
    world.model.stop("its memory is needed")
    assert world.model.state is State.WARM
    assert world.ask() is None
    await turn()
    assert world.model.state is State.COLD
    await world.model.close(is_kept=False)


@simulated
async def test_requests_that_wait_for_memory_are_no_sign_of_a_hang() -> None:
    world = World()
    engine = await world.up()
    lease = world.take()
    engine.num_running = 1
    world.model.observed(row(waiting_bytes=5))
    await asyncio.sleep(600)
    assert world.model.state is State.BUSY
    world.model.observed(row())
    await asyncio.sleep(50)
    engine.num_tokens += 1
    await asyncio.sleep(50)
    assert world.model.state is State.BUSY
    await asyncio.sleep(20)
    assert "it runs 1 requests, and no token came for" in world.model.reason
    assert world.model.state is State.DRAINING
    await asyncio.sleep(31)
    assert engine.endings == ["aborted"]
    assert not lease.is_held
    await world.model.close(is_kept=False)


@simulated
async def test_a_stale_count_of_an_idle_engine_is_no_sign_of_a_hang() -> None:
    world = World()
    engine = await world.up()
    engine.num_running = 1
    await asyncio.sleep(600)
    assert world.model.state is State.WARM
    await world.model.close(is_kept=False)


@simulated
async def test_an_adopted_engine_keeps_what_was_known_of_it() -> None:
    world = World()
    world.model.adopt(record_of())
    await turn()
    world.runner.succeed()
    await turn()
    model = world.model
    assert (model.start_seconds, model.num_starts, model.token) == (7.0, 3, TOKEN)
    assert model.record() == replace(record_of(), start_seconds=7.0, num_starts=3)
    await model.close(is_kept=True)
    assert world.runner.engines[0].is_left
    assert world.runner.engines[0].is_alive


@simulated
async def test_what_is_not_adopted_is_cold_and_not_failed() -> None:
    world = World()
    world.model.adopt(record_of())
    await turn()
    world.runner.fail(AdoptionError("its socket is gone"))
    await turn()
    assert (world.model.state, world.model.reason) == (State.COLD, "its socket is gone")
    assert world.model.refusal() is None
    await world.model.close(is_kept=False)


@simulated
async def test_adapters_come_at_their_first_request_and_the_least_used_goes() -> None:
    world = World(ADAPTERS)
    engine = await world.up()
    assert engine.max_adapters == 2
    assert world.ask("x") is None
    assert world.ask("x") is None  # one load for any number of requests
    await asyncio.sleep(1.5)
    lease = world.take("x")
    assert lease.adapter == "x"
    assert world.ask("y") is None
    await asyncio.sleep(1.5)
    world.take("y").end(Ending.DONE)
    assert world.ask("z") is None
    await asyncio.sleep(1.5)
    assert engine.asked == [("x", "/x"), ("y", "/y"), ("y", "unloaded"), ("z", "/z")]
    assert world.model.adapters == ("x", "z")
    held = world.take("z")
    assert world.ask("y") is None  # both are in use, so it waits
    await asyncio.sleep(1.5)
    assert world.model.adapters == ("x", "z")
    held.end(Ending.DONE)
    assert world.ask("y") is None
    await asyncio.sleep(1.5)
    assert world.model.adapters == ("x", "y")
    lease.end(Ending.DONE)
    await world.model.close(is_kept=False)


@simulated
async def test_while_an_adapter_loads_all_others_need_not_wait_for_it() -> None:
    world = World(ADAPTERS, aliases=("other",))
    await world.up()

    def names(behind: str) -> set[str]:
        assert world.ask(behind) is None
        return set(world.model.may_go_past(Ask(behind, "/v1/completions", 10)))

    own = {"a", "other"}
    assert names("x") == own  # it has no other adapter yet
    await asyncio.sleep(1.5)
    held = [world.take("x")]
    assert not world.model.may_go_past(Ask("x", "/v1/completions", 10))
    assert not world.model.may_go_past(Ask("a", "/v1/completions", 10))
    assert names("y") == own | {"x"}
    assert names("z") == own  # its turn comes after that one
    await asyncio.sleep(1.5)
    held.append(world.take("y"))
    assert names("z") == own  # requests for the other two would keep their places for ever
    for lease in held:
        lease.end(Ending.DONE)
    await world.model.close(is_kept=False)


@simulated
async def test_an_adapter_that_cannot_be_loaded_holds_up_nobody() -> None:
    world = World(ADAPTERS)
    await world.up()
    assert world.ask("lost") is None
    await asyncio.sleep(1.5)
    assert world.num_lease_news == 1
    world.take("lost").end(Ending.DONE, status=404)  # its engine says that it has none
    await asyncio.sleep(31)
    assert world.ask("lost") is None  # it is tried again
    await asyncio.sleep(1.5)
    await world.model.close(is_kept=False)


@simulated
async def test_an_engine_whose_end_fails_fails_its_model() -> None:
    world = World()
    engine = await world.up()

    async def stay(_seconds: float, *, is_hung: bool = False) -> str:
        raise TimeoutError("processes [7] of engine 7 do not end")

    engine.end = stay  # type: ignore[method-assign]
    world.model.stop("a test wants it")
    await turn()
    assert world.model.state is State.FAILED
    assert "do not end" in world.model.failure
    await world.model.close(is_kept=False)


@simulated
async def test_one_that_is_stopped_at_once_waits_for_no_lease_and_has_no_last_word() -> None:
    world = World()
    engine = await world.up()
    lease = world.take()
    world.model.stop("a test wants it", is_at_once=True)
    await turn()
    assert world.model.state is State.COLD
    assert engine.endings == ["aborted"]
    assert not lease.is_held


@simulated
async def test_one_whose_answer_begins_before_it_ends_at_once_serves_on() -> None:
    world = World()
    engine = await world.up()
    begun, other = world.take(), world.take()
    world.model.stop("a test wants it", is_at_once=True)
    assert begun.first_byte()  # behind the decision, before the model's task carries it out
    await turn()
    assert world.told[-2:] == [State.DRAINING, State.BUSY]
    assert not engine.endings
    assert begun.is_held
    assert other.first_byte()
    assert world.ask() is not None
    await world.model.settled()
    world.model.stop("a test wants it")
    begun.end(Ending.DONE)
    await turn()
    assert world.model.state is State.DRAINING  # it can be told to end as before
    await world.model.close(is_kept=False)


@simulated
async def test_a_drain_without_an_end_hears_a_later_wish() -> None:
    world = World()
    await world.up()
    world.take()  # it never ends
    world.model.stop("a test wants it")
    await asyncio.sleep(1000)
    assert world.model.state is State.DRAINING
    world.model.stop("a test wants it soon", drain_seconds=5.0)
    await asyncio.sleep(10)
    assert world.model.state is State.COLD
    await world.model.close(is_kept=False)


@simulated
async def test_no_answer_begins_once_its_engine_ends_or_has() -> None:
    for how in ("it hangs", "it died", "it is stopped"):
        world = World()
        engine = await world.up()
        begun, waiting = world.take(), world.take()
        begun.first_byte()
        if how == "it hangs":
            engine.is_well = False
            await asyncio.sleep(1000)
        elif how == "it died":
            engine.crashed.set()
            await turn()
        else:
            world.model.stop("a test wants it", drain_seconds=5.0)
            await asyncio.sleep(10)
        assert world.model.state is State.COLD
        assert not waiting.first_byte()
        assert begun.first_byte()  # it is cut off: nobody may ask again
        await world.model.close(is_kept=False)


@simulated
async def test_another_process_is_asked_before_its_model_ends_at_once() -> None:
    asked = asyncio.Event()

    async def close() -> None:
        asked.set()
        await answer.wait()

    for has_begun, is_silent in ((False, False), (True, False), (False, True)):
        world = World()
        await world.up()
        lease, answer = world.take(), asyncio.Event()
        lease.held_by(close)
        asked.clear()
        world.model.stop("a test wants it", is_at_once=True)
        await asked.wait()
        assert world.model.state is State.DRAINING
        if has_begun:
            assert lease.first_byte()  # it crossed the question
        if is_silent:
            await asyncio.sleep(CLOSE_SECONDS + 0.1)
        answer.set()
        await turn()
        assert world.model.state is (State.BUSY if has_begun or is_silent else State.COLD)
        assert lease.first_byte() is (has_begun or is_silent)
        await world.model.close(is_kept=False)


@simulated
async def test_leases_know_whether_one_of_them_is_answered_in_part() -> None:
    world = World()
    await world.up()
    first, second = world.take(), world.take()
    assert not world.model.leases.have_begun
    second.first_byte()
    assert world.model.leases.have_begun
    second.end(Ending.DONE)
    assert not world.model.leases.have_begun
    first.end(Ending.DONE)


@simulated
async def test_nobody_is_sent_to_an_engine_that_broke_a_connection_before_it_is_known_to_live() -> (
    None
):
    world = World()
    engine = await world.up()
    engine.is_well = False
    for lease in (world.take(), world.take()):
        lease.end(Ending.DIED_BEFORE)
    assert world.ask() is None
    await asyncio.sleep(5.0)
    assert world.ask() is None
    engine.is_well, before = True, world.num_lease_news
    await asyncio.sleep(5.0)
    assert world.num_lease_news == before + 1  # the line hears of it
    assert world.ask() is not None


@simulated
async def test_an_engine_that_died_before_it_answered_is_asked_no_more_and_the_next_one_is() -> (
    None
):
    world = World()
    engine = await world.up()
    engine.is_well = False
    world.take().end(Ending.DIED_BEFORE)
    engine.crashed.set()
    await turn()
    assert world.model.state is State.COLD
    assert world.ask() is None
    await world.up()
    assert world.take().address is world.runner.engines[-1].address
