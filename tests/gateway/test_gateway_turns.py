"""Real engines on a pool with room for the weights of two of three, where two are always asked.

The third one waits for its weights, or for its start.
"""

import asyncio
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import pytest
from helpers import gateway_served
from helpers.gateway_served import LOOK_SECONDS, PAGE, House, Inside, ask_in_turn, client

from kvcached_gateway.control.rooms import GAP_SECONDS
from kvcached_gateway.state import UP, State

pytestmark = [pytest.mark.slow, pytest.mark.every_release, pytest.mark.vllm]

# The weights of a model are 6 pages, and each engine keeps one more for as long as it lives. Beside
# the weights of two and three such pages 5 are left for requests, and a third one's are 6.
NUM_PAGES = 20
TURN_SECONDS = 1.0
MOST_SECONDS = 25.0
MOST_SECONDS_OF_A_START = 100.0
NUM_TOKENS = 120
# Beside two such engines a third one does not start: its weights and its longest request take 11.
NUM_PAGES_OF_A_START = 24
# Where the machine is short of processors a neighbour may idle for a moment all the same.
NUM_TRIES = 8


@pytest.fixture(params=[NUM_PAGES])
def house(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[House]:
    pool_bytes = request.param * PAGE
    monkeypatch.setitem(gateway_served.ENVIRON_OF_ALL, "KVCACHED_HOST_POOL", str(pool_bytes))
    with tempfile.TemporaryDirectory(prefix="kvcached-") as folder:
        made = House(Path(folder), "abc", "")
        yield made
        made.close()


@dataclass
class Neighbour:
    """Asks a model for the next answer in the first part of each, so that its engine never idles.

    Attributes:
        has_ended: Set when an answer came to its end.
        wrong: Lines of answers that did not.
    """

    session: aiohttp.ClientSession
    url: str
    model: str
    has_ended: asyncio.Event = field(default_factory=asyncio.Event)
    wrong: list[str] = field(default_factory=list)
    is_over: bool = False
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def begin(self) -> None:
        if not self.is_over:
            self.tasks.append(asyncio.create_task(self._ask()))

    async def ends(self) -> None:
        """Wait for the ends of two answers."""
        for _ in range(2):
            self.has_ended.clear()
            await self.has_ended.wait()

    async def end(self) -> None:
        self.is_over = True
        for task in self.tasks:
            await task

    async def _ask(self) -> None:
        asked = {"prompt": "page", "max_tokens": NUM_TOKENS, "ignore_eos": True, "stream": True}
        lines: list[str] = []
        async with self.session.post(
            f"{self.url}/v1/completions", json={"model": self.model, **asked}
        ) as answer:
            async for line in answer.content:
                if not line.strip():
                    continue
                lines.append(line.decode().strip())
                if len(lines) == NUM_TOKENS // 4:
                    self.begin()
        if len(lines) < NUM_TOKENS // 4:  # some lines had more than one token
            self.begin()
        self.has_ended.set()
        if lines[-1] != "data: [DONE]":
            self.wrong.append(lines[-1])


async def ask_once(
    session: aiohttp.ClientSession, url: str, model: str, most_seconds: float
) -> str:
    """Ask a model for some tokens; return what is wrong with the answer."""
    asked = {"model": model, "prompt": "page", "max_tokens": 4}
    try:
        async with (
            asyncio.timeout(most_seconds),
            session.post(f"{url}/v1/completions", json=asked) as answer,
        ):
            return "" if answer.status == 200 else await answer.text()
    except TimeoutError:
        return f"{model} was not answered for {most_seconds:g} s"


def stop_and_wait_for_busy_ones(gateway: Inside) -> None:
    """Stop the third one, and wait until the others have had no moment without a request."""

    def are_ready() -> bool:
        *busy, third = (gateway.here.fleet.models[name] for name in "abc")
        if third.state in UP:
            third.stop("a test wants it")
        now = asyncio.get_running_loop().time()
        are_busy = all(
            one.state is State.BUSY and now - one.since > GAP_SECONDS + TURN_SECONDS for one in busy
        )
        return third.state is State.COLD and are_busy

    while not gateway.call(are_ready):
        time.sleep(LOOK_SECONDS)


async def ask_beside_busy_ones(gateway: Inside, *, is_cold: bool) -> tuple[list[str], list[str]]:
    """Ask a third model while two others never idle, until one of them held back for it.

    Args:
        gateway: Where.
        is_cold: Whether the third one has to start.

    Returns:
        Why it did, and what is wrong.
    """
    held: list[str] = []
    most_seconds = MOST_SECONDS_OF_A_START if is_cold else MOST_SECONDS
    async with client() as session:
        neighbours = [Neighbour(session, gateway.url, model) for model in "ab"]
        for each in neighbours:
            each.begin()
        for _ in range(NUM_TRIES):
            for each in neighbours:  # whoever held back goes on
                await each.ends()
            if held or any(each.wrong for each in neighbours):
                break
            if is_cold:
                await asyncio.to_thread(stop_and_wait_for_busy_ones, gateway)
            if wrong := await ask_once(session, gateway.url, "c", most_seconds):
                neighbours[0].wrong.append(wrong)
            decisions = await asyncio.to_thread(
                gateway.call, lambda: list(gateway.here.controller.decisions)
            )
            held = [one.reason for one in decisions if one.verb == "hold"]
        for each in neighbours:
            await each.end()
    return held, [text for each in neighbours for text in each.wrong]


def test_a_model_has_its_turn_beside_two_that_never_idle(house: House) -> None:
    house.write(turn=f"{TURN_SECONDS:g}s")
    with house.inside() as gateway:
        warm = ask_in_turn(gateway.url, ["c", "a", "b"])
        assert warm.are_all_right, warm.errors
        held, wrong = asyncio.run(ask_beside_busy_ones(gateway, is_cold=False))
    assert wrong == []
    assert held
    assert "until 'c' has its weights: it has waited more than 1 s" in held[0]


@pytest.mark.parametrize("house", [NUM_PAGES_OF_A_START], indirect=True)
def test_a_model_starts_beside_two_that_never_idle(house: House) -> None:
    house.write(turn=f"{TURN_SECONDS:g}s")
    with house.inside() as gateway:
        warm = ask_in_turn(gateway.url, ["a", "b"])
        assert warm.are_all_right, warm.errors
        held, wrong = asyncio.run(ask_beside_busy_ones(gateway, is_cold=True))
        stopped = gateway.call(
            lambda: [one for one in gateway.here.controller.decisions if one.verb == "stop"]
        )
    assert wrong == []
    assert held
    assert "until 'c' has its weights: it has waited more than 1 s" in held[0]
    assert stopped == []
