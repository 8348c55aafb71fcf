"""Ten minutes in which more models are asked than the host can hold: real engines start and stop.

`GATEWAY_SOAK_SECONDS` shortens it.
"""

import asyncio
import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import aiohttp
import pytest
from helpers.gateway_life import short_folder
from helpers.gateway_served import UP_SECONDS, Answers, House, Inside, ask, ask_in_turn
from helpers.waiting import await_that

from kvcached_demo.harness.model import make_model
from kvcached_gateway.models.model import Model
from kvcached_gateway.state import State

pytestmark = [pytest.mark.every_release, pytest.mark.vllm]

SECONDS = float(os.environ.get("GATEWAY_SOAK_SECONDS", "600"))
NAMES = tuple("abcdef")
NUM_HELD = 3  # the host's memory is made as large as these need, and a fifth of it more
VISIT_SECONDS, VISITS_APART_SECONDS, NUM_ASKS = 6.0, 20.0, 12
WAIT_SECONDS = 300
BUSY = "a"  # it is asked all the time
MINUTE = 60.0  # by default a model starts at most once in it


@pytest.fixture
def house() -> Iterator[House]:
    with short_folder() as path:
        built = House(path)
        built.models = {name: {**_model(path, seed, name)} for seed, name in enumerate(NAMES)}
        built.write()
        yield built
        built.close()


def _model(path: Path, seed: int, name: str) -> dict[str, str]:
    folder = make_model(path / f"model-{name}", seed=seed)
    return {"environment": "vllm", "model": str(folder), "max_wait": f"{WAIT_SECONDS}s"}


class Watch:
    """What models do: when they start, and who was stopped while it had requests."""

    def __init__(self) -> None:
        self.starts: dict[str, list[float]] = {name: [] for name in NAMES}
        self.stopped_busy: list[str] = []

    def changed(self, model: Model, before: State, after: State, _why: str) -> None:
        if after is State.STARTING:
            self.starts[model.id].append(time.monotonic())
        elif after is State.DRAINING and (before is State.BUSY or model.num_leases):
            self.stopped_busy.append(model.id)


@contextmanager
def load(url: str, seconds: float) -> Iterator[tuple[Answers, list[str]]]:
    """Ask one model all the time and visit the others in turn, from a thread, until it is over.

    What the block gets is what was answered, and which models were asked.
    """
    answers, asked = Answers(), list[str]()

    def client() -> aiohttp.ClientSession:
        timeout = aiohttp.ClientTimeout(WAIT_SECONDS + UP_SECONDS)
        return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout)

    async def all_the_time(end: float) -> None:
        async with client() as session:
            while time.monotonic() < end:
                asked.append(BUSY)
                await ask(session, url, BUSY, answers)
                await asyncio.sleep(0.5)

    async def visit(name: str) -> None:
        async with client() as session:
            asks = []
            for number in range(NUM_ASKS):
                asked.append(name)
                asks.append(asyncio.create_task(ask(session, url, name, answers, number)))
                await asyncio.sleep(VISIT_SECONDS / NUM_ASKS)
            await asyncio.gather(*asks)

    async def main() -> None:
        end = time.monotonic() + seconds
        going = [asyncio.create_task(all_the_time(end))]
        for name in visits(seconds):
            going.append(asyncio.create_task(visit(name)))
            await asyncio.sleep(VISITS_APART_SECONDS)
        await asyncio.gather(*going)

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    try:
        yield answers, asked
    finally:
        thread.join(seconds + WAIT_SECONDS + UP_SECONDS)
        assert not thread.is_alive()


def visits(seconds: float) -> Iterator[str]:
    """Return whom to visit: all in each round, in another order each time, nobody twice in turn."""
    source, last = random.Random(1), ""
    left = int(seconds // VISITS_APART_SECONDS)
    others = [name for name in NAMES if name != BUSY]
    while left > 0:
        order = source.sample(others, len(others))
        if order[0] == last:
            continue
        last = order[-1]
        yield from order[:left]
        left -= len(order)


def held_bytes(house: House) -> int:
    """Return what the processes of so many engines have together."""
    with house.inside() as gateway:
        assert ask_in_turn(gateway.url, NAMES[:NUM_HELD]).are_all_right
        held: dict[str, int] = {}

        def are_seen() -> bool:
            held.update(gateway.call(lambda: gateway.here.controller.machine.engines_bytes))
            return set(held) == set(NAMES[:NUM_HELD])

        await_that(are_seen, UP_SECONDS)
    return sum(held.values())


def watched(gateway: Inside) -> Watch:
    watch = Watch()
    gateway.call(lambda: gateway.here.fleet.on_change.append(watch.changed))
    return watch


@pytest.mark.timeout(int(SECONDS) + 600)
def test_more_models_than_the_host_holds_are_served_without_a_failure_and_seldom_start(
    house: House,
) -> None:
    house.write(engines_on_exit="stop")
    budget = int(held_bytes(house) * 1.2)
    house.write(host_memory=budget, engines_on_exit="stop", memory={})
    with house.inside() as gateway:
        watch = watched(gateway)
        with load(gateway.url, SECONDS) as (answers, asked):
            pass
        decisions = gateway.call(lambda: list(gateway.here.controller.decisions))
    stops = [one for one in decisions if one.verb == "stop"]
    starts = {name: len(each) for name, each in watch.starts.items()}
    print(f"{answers.seen}, {len(stops)} stops, starts {starts}")
    assert answers.seen == {200: len(asked)}, answers.errors[:5]
    assert not watch.stopped_busy
    assert stops, "it held all of them"
    assert all("host memory" in one.reason for one in stops)
    assert len(watch.starts[BUSY]) == 1
    for name, each in watch.starts.items():
        assert all(after - before >= MINUTE for before, after in pairwise(each)), (name, each)
