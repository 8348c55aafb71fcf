"""The line over models as they are, with a runner without engines: one start, order, no trace."""

import asyncio

import pytest
from helpers.gateway_line import ask, settle, simulated
from helpers.gateway_runner import FakeRunner

from kvcached_gateway.errors import EngineStartError, RefusedError
from kvcached_gateway.lease import Ending, Lease, Woken
from kvcached_gateway.line.line import Line
from kvcached_gateway.models.model import Model
from kvcached_gateway.settings.config import ModelSettings, ServiceClass, Settings

NUM_TURNS = 10


class House:
    """One model in a line, started as soon as somebody wants it."""

    def __init__(self, **more: object) -> None:
        found = ModelSettings(id="a", model="m", **more)  # type: ignore[arg-type]
        classes = {"chat": ServiceClass(name="chat", ttft_seconds=1.0)}
        self.settings = Settings(path="models.yaml", models={"a": found}, classes=classes)
        self.runner = FakeRunner()
        self.model = Model(found, self.runner)
        clock = asyncio.get_running_loop().time
        self.line = Line({"a": self.model}, lambda: self.settings, clock, self.want)
        self.model.on_change.append(lambda *_: self.line.changed("a"))
        self.model.on_lease.append(lambda *_: self.line.changed("a"))

    def want(self, model_id: str) -> None:
        self.model.start(("host",), f"a request waits for {model_id}")

    def start(self, number: int = 0) -> asyncio.Task[Lease]:
        return asyncio.create_task(self.line.take(ask("a", key=str(number), body_bytes=9_000)))

    async def settle(self) -> None:
        for _ in range(NUM_TURNS):
            await settle()


@pytest.mark.parametrize("class_name", [None, "chat"])
def test_fifty_requests_at_a_cold_model_make_one_start_and_are_answered_in_order(
    class_name: str | None,
) -> None:
    @simulated
    async def main() -> None:
        house = House(class_name=class_name, max_concurrent=4)
        tasks = [house.start(number) for number in range(50)]
        answered: list[int] = []
        await asyncio.sleep(5)
        house.runner.succeed()
        while len(answered) < len(tasks):
            await house.settle()
            ready = [
                number
                for number, task in enumerate(tasks)
                if task.done() and number not in answered
            ]
            assert 0 < len(ready) <= 4
            for number in ready:
                lease = tasks[number].result()
                assert lease.woken is Woken.START
                lease.first_byte()
                lease.end(Ending.DONE)
            answered += ready
        assert answered == sorted(answered)
        assert house.runner.num_starts == 1
        assert not house.model.num_leases
        assert not house.line.waiting("a")
        await house.model.close(is_kept=False)

    main()


@simulated
async def test_a_model_that_came_up_for_a_client_that_left_is_started_again_when_it_is_down() -> (
    None
):
    house = House()
    left = house.start()
    await house.settle()
    left.cancel()
    await house.settle()
    house.runner.succeed()
    await house.settle()
    house.model.stop("it was idle")
    await house.settle()
    asked = house.start()
    await house.settle()
    assert house.runner.num_starts == 2
    house.runner.succeed()
    (await asked).end(Ending.DONE)
    await house.model.close(is_kept=False)


@simulated
async def test_a_start_that_fails_refuses_all_that_wait_and_the_next_one_is_begun_later() -> None:
    house = House()
    tasks = [house.start(number) for number in range(3)]
    await house.settle()
    house.runner.fail(EngineStartError("no such weights"))
    for task in tasks:
        with pytest.raises(RefusedError, match="no such weights") as caught:
            await task
        assert caught.value.code == "model_failed"
        assert caught.value.retry_after_seconds
    await asyncio.sleep(caught.value.retry_after_seconds + 1)
    again = house.start()
    await house.settle()
    assert house.runner.num_starts == 2
    house.runner.succeed()
    (await again).end(Ending.DONE)
    await house.model.close(is_kept=False)


@simulated
async def test_whoever_waits_when_an_engine_dies_has_it_started_again() -> None:
    house = House(max_concurrent=1)
    first, second = house.start(1), house.start(2)
    await house.settle()
    engine = house.runner.succeed()
    lease = await first
    engine.crashed.set()
    await house.settle()
    lease.end(Ending.DIED_BEFORE)
    again = asyncio.create_task(house.line.take(ask("a", key="1", is_again=True)))
    await asyncio.sleep(10)
    assert house.runner.num_starts == 2
    house.runner.succeed()
    lease = await again
    assert not second.done()
    lease.end(Ending.DONE)
    (await second).end(Ending.DONE)
    await house.model.close(is_kept=False)
