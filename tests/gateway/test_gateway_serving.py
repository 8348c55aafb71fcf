"""Real engines behind a gateway: started on demand, in turn, reloaded, adopted, ended."""

import asyncio
import os
import random
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from helpers.gateway_life import short_folder
from helpers.gateway_served import (
    UP_SECONDS,
    Answers,
    House,
    Inside,
    Outside,
    ask,
    ask_all,
    ask_in_turn,
    client,
    load,
    rows_by_name,
    see_busy_ones_go,
    see_starts,
)
from helpers.waiting import await_that

from kvcached_gateway.admin.client import Client, GatewayError
from kvcached_gateway.engines.sessions import members
from kvcached_gateway.errors import GatewayRunningError
from kvcached_gateway.state import State

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.sglang]

ALL = ("a", "b", "c", "s")


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    with short_folder() as path:
        built = House(path)
        yield built
        built.close()


@pytest.fixture
def gateway(house: House) -> Iterator[Inside]:
    """Serve from this process; engines that run already are adopted."""
    house.write()
    left = house.records()
    with house.inside() as gateway:
        fleet = gateway.here.fleet
        reasons = gateway.call(lambda: {name: each.reason for name, each in fleet.models.items()})
        assert gateway.here.num_adopted == len(left), reasons
        yield gateway


def states(gateway: Inside) -> dict[str, State]:
    return gateway.call(lambda: {n: each.state for n, each in gateway.here.fleet.models.items()})


def num_starts(gateway: Inside) -> dict[str, int]:
    return gateway.call(
        lambda: {name: each.num_starts for name, each in gateway.here.fleet.models.items()}
    )


def num_waiting(gateway: Inside, model: str) -> int:
    return gateway.call(lambda: rows_by_name(gateway.here.gateway.models())[model].num_waiting)


def await_line(gateway: Inside, model: str, num: int) -> None:
    """Wait until so many requests wait for a model."""
    await_that(lambda: num_waiting(gateway, model) >= num, UP_SECONDS)


def await_state(gateway: Inside, model: str, *wanted: State) -> None:
    await_that(lambda: states(gateway)[model] in wanted, UP_SECONDS)


def test_fifty_requests_at_a_cold_model_make_one_start_beside_another_and_are_answered_in_order(
    house: House, gateway: Inside
) -> None:
    limited = house.models | {"a": house.models["a"] | {"max_concurrent": 1}}
    house.write(limited, max_starting=2)
    Client(house.directory).reload()
    answers, starting = Answers(), see_starts(gateway)

    async def main() -> None:
        async with client() as session:
            tasks = []
            # The others load while the first one does: their requests wait, too.
            for number, name in [(0, "a"), *((99, name) for name in ALL if name != "a")]:
                tasks.append(asyncio.create_task(ask(session, gateway.url, name, answers, number)))
                await asyncio.to_thread(await_line, gateway, name, 1)
            for number in range(1, 50):
                tasks.append(asyncio.create_task(ask(session, gateway.url, "a", answers, number)))
                await asyncio.to_thread(await_line, gateway, "a", number + 1)
            await asyncio.gather(*tasks)

    asyncio.run(main())
    assert answers.seen == {200: 53}, answers.errors
    assert [number for number in answers.order if number < 50] == list(range(50))
    assert num_starts(gateway) == dict.fromkeys(ALL, 1)
    # The two that were asked first start together, and never are there more than two.
    assert {"a", "b"} in starting
    assert max(map(len, starting)) == 2


def test_models_whose_weights_do_not_fit_together_take_turns_and_none_starts_again(
    gateway: Inside,
) -> None:
    before = gateway.pids
    chosen = random.Random(5)
    answers = ask_in_turn(gateway.url, [chosen.choice(ALL) for _ in range(60)], num_at_once=3)
    assert answers.seen == {200: 60}, answers.errors
    assert gateway.pids == before
    assert num_starts(gateway) == dict.fromkeys(ALL, 1)


# Under `make test` two hundred come to a model that was told to sleep: test_gateway_edges.
@pytest.mark.every_release
def test_two_hundred_requests_at_a_yielded_model_wake_it_and_none_is_lost(gateway: Inside) -> None:
    assert ask_in_turn(gateway.url, ALL).are_all_right
    before = gateway.pids
    # The weights of all do not fit, so some are gone of whoever was asked first.
    await_that(lambda: State.YIELDED in states(gateway).values(), UP_SECONDS)
    yielded = next(name for name, state in states(gateway).items() if state is State.YIELDED)
    answers = ask_all(gateway.url, [yielded] * 200)
    assert answers.seen == {200: 200}, answers.errors
    assert gateway.pids == before


def test_a_second_gateway_refuses_and_the_first_goes_on(house: House, gateway: Inside) -> None:
    with pytest.raises(GatewayRunningError, match=f"process {os.getpid()} serves"), house.inside():
        pass
    second = house.outside().process
    assert second.wait(UP_SECONDS) == 1
    assert ask_all(gateway.url, ["a"]).are_all_right


def test_a_reload_under_load_loses_nothing_and_leaves_untouched_models_alone(
    house: House, gateway: Inside
) -> None:
    asker = Client(house.directory, UP_SECONDS)
    assert ask_in_turn(gateway.url, ALL).are_all_right
    before = gateway.pids
    with load(gateway.url, "a", "s") as answers:
        house.file.write_text("models: {a: {environment: gone}}\n")
        with pytest.raises(GatewayError, match=r"models\.a needs"):
            asker.reload()
        models: dict[str, Any] = {name: house.models[name] for name in "abs"}
        models["b"] = models["b"] | {"args": ["--max-num-seqs", "3"]}
        models["d"] = house.models["c"] | {"aliases": ["new"]}
        house.write(models)
        assert "c" in asker.reload()
        await_state(gateway, "b", State.COLD, State.STARTING)
        assert ask_all(gateway.url, ["new", "d", "b"]).are_all_right
        assert ask_all(gateway.url, ["c"]).seen == {404: 1}
    assert answers.are_all_right, answers.errors
    assert sum(answers.seen.values()) > 10
    after = gateway.pids
    assert {name for name in "as" if after[name] == before[name]} == {"a", "s"}
    assert set(after) == {"a", "b", "d", "s"}
    assert after["b"] != before["b"]
    house.models = models


def test_a_gateway_that_was_killed_under_load_leaves_engines_that_the_next_one_has(
    house: House,
) -> None:
    left = left_running(house)
    first = house.outside().wait_up()
    before = starts_by_name(first.client)
    with load(first.url, *left) as answers:
        await_that(lambda: answers.seen[200] >= 10, UP_SECONDS)
        first.process.kill()
        first.process.wait()
    second = house.outside().wait_up()
    try:
        answers = ask_all(second.url, sorted(left) * 5)
        assert answers.seen == {200: 5 * len(left)}, answers.errors
        assert starts_by_name(second.client) == before
    finally:
        lines = end_while_it_answers(second)
    assert lines[-1] == "data: [DONE]"
    assert {record.model_id: record.identity.pid for record in house.records()} == left


def left_running(house: House) -> dict[str, int]:
    """Have every model's engine run without a gateway; return their first processes."""
    house.write()
    with house.inside() as gateway:
        assert ask_in_turn(gateway.url, list(house.models)).are_all_right
    left = {record.model_id: record.identity.pid for record in house.records()}
    assert set(left) == set(house.models)
    return left


def starts_by_name(asker: Client) -> dict[str, int]:
    return {row.id: row.num_starts for row in asker.models()}


def end_while_it_answers(gateway: Outside) -> list[str]:
    """Tell a gateway to end in the middle of an answer; return the answer's lines."""
    asked = {"model": "a", "prompt": "page", "max_tokens": 100, "stream": True, "ignore_eos": True}
    lines: list[str] = []

    async def main() -> None:
        url = f"{gateway.url}/v1/completions"
        async with client() as session, session.post(url, json=asked) as answer:
            async for line in answer.content:
                if not lines:
                    gateway.process.send_signal(signal.SIGTERM)
                lines.append(line.decode().strip())

    asyncio.run(main())
    assert gateway.process.wait(UP_SECONDS) == 0
    return [line for line in lines if line]


@pytest.mark.every_release  # as the soak, which shows it for longer
def test_models_start_and_stop_in_turn_where_the_host_cannot_hold_all_and_no_busy_one_goes(
    house: House,
) -> None:
    first, second, third = names = [
        name for name, each in house.models.items() if each["environment"] == "vllm"
    ]
    house.models = {name: house.models[name] for name in names}
    house.write()
    with house.inside() as gateway:
        assert ask_in_turn(gateway.url, [first, second]).are_all_right
        gateway.call(lambda: gateway.here.fleet.models[third].stop("a test wants it"))
        await_state(gateway, third, State.COLD)
        held_bytes = gateway.call(lambda: dict(gateway.here.controller.machine.engines_bytes))
    assert set(held_bytes) == {first, second}
    house.write(host_memory=int(sum(held_bytes.values()) * 1.25))
    with house.inside() as gateway:
        busy = see_busy_ones_go(gateway)
        answers = ask_in_turn(gateway.url, [third, first, second, third], num_at_once=2)
        assert answers.seen == {200: 4}, answers.errors
        assert not busy
        decisions = gateway.call(lambda: list(gateway.here.controller.decisions))
        stops = [one for one in decisions if one.verb == "stop"]
        assert stops
        assert all("host memory" in one.reason for one in stops)
        assert len(gateway.pids) <= 2


def test_engines_that_are_not_kept_end_with_their_gateway(house: House) -> None:
    house.models = {"a": house.models["a"]}
    left_running(house)
    house.write(engines_on_exit="stop")
    left = house.records()
    with house.inside() as gateway:
        assert gateway.here.num_adopted == len(left)
    assert not any(members(record.identity) for record in left)
    assert house.records() == []
