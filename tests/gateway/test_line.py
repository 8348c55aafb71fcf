"""The waiting line, over models without engines, on a loop whose time costs nothing."""

import asyncio
from collections.abc import Callable

import pytest
from helpers.gateway_clock import SimulatedLoop
from helpers.gateway_line import World, ask, refused, settle, simulated
from helpers.gateway_models import FakeGrantor
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvcached_gateway.errors import RefusedError
from kvcached_gateway.lease import Ask, Ending, Lease
from kvcached_gateway.line.grantor import Readiness
from kvcached_gateway.line.line import Line
from kvcached_gateway.line.tickets import QueueView
from kvcached_gateway.settings.config import ModelSettings


@simulated
async def test_a_model_that_is_up_gives_a_lease_without_a_switch_to_another_task() -> None:
    world = World(FakeGrantor("a"))
    call = world.line.take(ask())
    with pytest.raises(StopIteration) as done:
        call.send(None)
    assert done.value.value.model_id == "a"
    assert not world.wanted
    assert not list(world.line.views())


@simulated
async def test_an_unknown_name_is_refused() -> None:
    world = World(FakeGrantor("a"))
    for name in ("b", "nobody"):
        error = await refused(world.start(name))
        assert (error.status, error.code) == (404, "model_not_found")


@simulated
async def test_fifty_requests_at_a_cold_model_want_one_start_and_are_served_in_order() -> None:
    world = World(FakeGrantor("a", Readiness.COLD))
    tasks = [world.start(key=str(number)) for number in range(50)]
    await settle()
    assert world.wanted == ["a"]
    assert world.line.waiting("a") == 50
    world.set("a", Readiness.COMING)
    await asyncio.sleep(20)
    assert list(world.line.views()) == [QueueView("a", 50, 20.0)]
    world.set("a", Readiness.UP)
    leases = await asyncio.gather(*tasks)
    assert [one.key for one in world.models["a"].granted] == [str(n) for n in range(50)]
    assert {lease.waited_seconds for lease in leases} == {20.0}
    assert world.wanted == ["a"]


@simulated
async def test_a_start_that_came_to_nothing_is_wanted_again_by_those_who_wait() -> None:
    world = World(FakeGrantor("a", Readiness.COLD))
    task = world.start()
    await settle()
    world.line.changed("a")
    assert world.wanted == ["a"]
    world.set("a", Readiness.COMING)
    world.set("a", Readiness.COLD)
    assert world.wanted == ["a", "a"]
    task.cancel()
    await settle()
    world.set("a", Readiness.COMING)
    world.set("a", Readiness.COLD)
    assert world.wanted == ["a", "a"]


@simulated
async def test_a_line_that_is_full_refuses_with_a_time_to_come_again() -> None:
    world = World(FakeGrantor("a", Readiness.COMING), max_queue=2)
    held = [world.start(), world.start()]
    await settle()
    error = await refused(world.start())
    assert (error.status, error.code) == (429, "queue_full")
    assert "max_queue is 2" in error.message
    assert error.retry_after_seconds
    again = world.start(is_again=True)
    await settle()
    assert world.line.waiting("a") == 3
    world.set("a", Readiness.UP)
    await asyncio.gather(*held, again)


@simulated
async def test_who_waits_longer_than_the_model_allows_is_told_what_for() -> None:
    world = World(FakeGrantor("a", Readiness.COLD, start_seconds=40), max_wait_seconds=30)
    error = await refused(world.start())
    assert asyncio.get_running_loop().time() == pytest.approx(30)
    assert (error.status, error.code, error.retry_after_seconds) == (503, "model_loading", 40)
    assert "c holds what a needs" in error.message
    assert not world.line.waiting("a")


@simulated
async def test_who_waits_too_long_for_a_busy_model_is_told_so() -> None:
    world = World(FakeGrantor("a", max_concurrent=1), max_wait_seconds=30)
    await world.start()
    error = await refused(world.start())
    assert (error.status, error.code) == (503, "model_busy")


@simulated
async def test_a_model_that_holds_back_gets_no_request_and_serves_them_in_order_afterwards() -> (
    None
):
    world = World(FakeGrantor("a"), FakeGrantor("b"))
    before = await world.start()
    world.held["a"] = "it is another one's turn"
    tasks = [world.start(key=str(number)) for number in range(3)]
    again = world.start(key="again", is_again=True)
    await world.start("b")
    await settle()
    world.end("a")
    await settle()
    assert not any(task.done() for task in (*tasks, again))
    assert world.line.waiting("a") == 4
    world.held.clear()
    world.line.changed("a")
    await asyncio.gather(*tasks, again)
    assert [one.key for one in world.models["a"].granted] == [None, "again", "0", "1", "2"]
    assert before not in world.models["a"].leases


@simulated
async def test_who_waits_too_long_for_one_that_holds_back_is_told_why() -> None:
    world = World(FakeGrantor("a"), max_wait_seconds=30)
    world.held["a"] = "it is another one's turn"
    error = await refused(world.start())
    assert (error.status, error.code) == (503, "model_busy")
    assert error.message.endswith("which is max_wait; it is another one's turn")


@simulated
async def test_the_clients_own_deadline_ends_its_wait_first() -> None:
    world = World(FakeGrantor("a", Readiness.COMING), max_wait_seconds=30)
    other = world.start()
    error = await refused(world.start(deadline_seconds=2.5))
    assert asyncio.get_running_loop().time() == pytest.approx(2.5)
    assert (error.status, error.code) == (504, "deadline")
    assert world.line.waiting("a") == 1
    world.set("a", Readiness.UP)
    await other


@simulated
async def test_who_does_not_want_to_wait_for_a_start_is_refused_and_the_start_goes_on() -> None:
    world = World(FakeGrantor("a", Readiness.COLD), loading="refuse")
    for _ in range(3):
        assert (await refused(world.start())).code == "model_loading"
    assert world.wanted == ["a"]
    world.set("a", Readiness.UP)
    await world.start()


@simulated
async def test_a_model_that_fails_refuses_those_who_wait_and_those_who_come() -> None:
    world = World(FakeGrantor("a", Readiness.COMING))
    tasks = [world.start() for _ in range(3)]
    await settle()
    world.models["a"].failure = "no such weights"
    world.set("a", Readiness.COLD)
    errors = [await refused(task) for task in (*tasks, world.start())]
    assert {error.code for error in errors} == {"model_failed"}
    assert len(set(map(id, errors))) == 4, "each has a traceback of its own"
    assert not world.wanted


@simulated
async def test_a_model_that_left_the_file_refuses_those_who_wait() -> None:
    world = World(FakeGrantor("a", Readiness.COMING))
    task = world.start()
    await settle()
    del world.models["a"]
    world.line.changed("a")
    assert (await refused(task)).code == "model_not_found"


@simulated
async def test_an_adapter_waits_with_its_base_and_keeps_its_name() -> None:
    world = World(FakeGrantor("a", Readiness.COLD))
    world.set_settings(ModelSettings(id="b", adapter_of="a"))
    task = world.start("b")
    await settle()
    assert world.wanted == ["a"]
    assert world.line.waiting("a") == 1
    world.set("a", Readiness.UP)
    await task
    assert world.models["a"].granted[0].model == "b"


@simulated
async def test_a_request_whose_engine_died_goes_before_all_others_behind_its_like() -> None:
    world = World(FakeGrantor("a", Readiness.COMING))
    tasks = [world.start(key="first"), world.start(key="second")]
    tasks += [world.start(key=f"again {n}", is_again=True) for n in range(2)]
    await settle()
    world.set("a", Readiness.UP)
    await asyncio.gather(*tasks)
    keys = [one.key for one in world.models["a"].granted]
    assert keys == ["again 0", "again 1", "first", "second"]


@simulated
async def test_a_client_that_leaves_just_as_its_lease_comes_gives_it_back() -> None:
    world = World(FakeGrantor("a", Readiness.COMING))
    task = world.start()
    await settle()
    world.set("a", Readiness.UP)  # the lease is given, and the task has not gone on
    task.cancel()
    await settle()
    assert task.cancelled()
    assert not world.models["a"].leases
    assert world.models["a"].endings == [Ending.CANCELLED]


@simulated
async def test_a_lease_goes_on_to_the_next_when_its_client_left_before_it_came() -> None:
    world = World(FakeGrantor("a", max_concurrent=1))
    await world.start()
    leaving, staying = world.start(), world.start()
    await settle()
    leaving.cancel()  # its task has not gone on, and its ticket is still there
    world.end("a")
    await settle()
    assert leaving.cancelled()
    world.line.changed("a")
    await staying
    assert not world.line.waiting("a")


class Chatty(FakeGrantor):
    """Says that it changed while it grants, as a model that becomes busy does."""

    line: Line

    def grant(self, ask: Ask, waited_seconds: float) -> Lease | None:
        lease = super().grant(ask, waited_seconds)
        self.line.changed(self.id)
        return lease


@simulated
async def test_a_model_that_says_so_while_it_grants_keeps_the_order() -> None:
    model = Chatty("a", Readiness.COMING)
    world = World(model, max_queue=2_000)
    model.line = world.line
    tasks = [world.start(key=str(number)) for number in range(2_000)]
    await settle()
    world.set("a", Readiness.UP)
    await asyncio.gather(*tasks)
    assert [one.key for one in model.granted] == [str(n) for n in range(2_000)]


class AnyOrder(RuleBasedStateMachine):
    """Requests come and leave, leases end, models go up and down and time passes, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner(loop_factory=SimulatedLoop)
        self.tasks: list[asyncio.Task[Lease]] = []
        self.left: set[int] = set()
        self.world = self.runner.run(self.make())

    async def make(self) -> World:
        return World(FakeGrantor("a", max_concurrent=2), FakeGrantor("b", max_concurrent=1))

    def do(self, what: Callable[[], object]) -> None:
        async def run() -> None:
            what()
            await settle()

        self.runner.run(run())

    @rule(model=st.sampled_from("ab"))
    def come(self, model: str) -> None:
        self.do(lambda: self.tasks.append(self.world.start(model, key=str(len(self.tasks)))))

    @rule(number=st.integers(0, 20))
    def leave(self, number: int) -> None:
        if number < len(self.tasks):
            self.left.add(number)
            self.do(self.tasks[number].cancel)

    @rule(model=st.sampled_from("ab"))
    def end(self, model: str) -> None:
        if self.world.models[model].leases:
            self.do(lambda: self.world.end(model))

    @rule(model=st.sampled_from("ab"), readiness=st.sampled_from(Readiness))
    def change(self, model: str, readiness: Readiness) -> None:
        before, num_wanted = self.world.models[model].readiness, self.world.wanted.count(model)
        self.do(lambda: self.world.set(model, readiness))
        is_needed = readiness is Readiness.COLD is not before and self.world.line.waiting(model)
        assert self.world.wanted.count(model) == num_wanted + bool(is_needed)

    @rule(seconds=st.integers(1, 200))
    def time_passes(self, seconds: int) -> None:
        self.runner.run(asyncio.sleep(seconds))

    @invariant()
    def a_model_with_room_has_no_line(self) -> None:
        for model in self.world.models.values():
            has_room = len(model.leases) < model.max_concurrent
            is_up = model.readiness is Readiness.UP
            assert not (is_up and has_room and self.world.line.waiting(model.id))

    @invariant()
    def only_requests_that_are_still_there_have_a_ticket_or_a_lease(self) -> None:
        num_waiting = sum(self.world.line.waiting(name) for name in "ab")
        assert num_waiting == sum(not task.done() for task in self.tasks)

    @invariant()
    def nobody_waits_longer_than_the_model_allows(self) -> None:
        now = self.runner.get_loop().time()
        assert all(self.world.line.oldest_wait_seconds(name, now) < 300.1 for name in "ab")

    @invariant()
    def leases_come_in_the_order_in_which_requests_came(self) -> None:
        for model in self.world.models.values():
            numbers = [int(one.key or "") for one in model.granted]
            assert numbers == sorted(numbers)

    def teardown(self) -> None:
        for name in "ab":
            self.change(name, Readiness.UP)
        while any(model.leases for model in self.world.models.values()):
            self.end("a")
            self.end("b")
        assert not list(self.world.line.views())
        for number, task in enumerate(self.tasks):
            assert task.done()
            if number not in self.left:
                assert task.exception() is None or isinstance(task.exception(), RefusedError)
        self.runner.close()


TestAnyOrder = AnyOrder.TestCase
