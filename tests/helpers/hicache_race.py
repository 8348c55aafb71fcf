"""Requests to a SGLang server come, end and are aborted while memory moves."""

import asyncio
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import httpx

from helpers.hicache_server import body_of
from helpers.house import Neighbour
from helpers.waiting import PATIENCE_SECONDS
from kvcached_core.config import read_config
from kvcached_core.control import Outcome, set_limit, trim
from kvcached_demo.harness.server import EngineServer

NUM_PREFIXES = 8
MAX_RUNNING = 6
STUCK_SECONDS = 5.0  # without an answer
MAX_TAKEN_PAGES = 12
NUM_ASKED_AGAIN = 6


class Raced(Protocol):
    """The server of a race."""

    @property
    def server(self) -> EngineServer:
        """Its process."""

    @property
    def directory(self) -> Path:
        """The folder of the ledgers."""

    def ask(self, prompt: list[int], num_tokens: int = 8, /) -> list[int]:
        """Return the tokens of an answer."""


class Race:
    """Draws what happens next, and does it.

    Args:
        server: The server.
        pool_bytes: The memory that it shares with a neighbour.
        seed: What is drawn with.

    Attributes:
        counts: What happened, and how often.
        num_stopped: How often a request was stopped for memory, of those that were answered.
    """

    def __init__(self, server: Raced, pool_bytes: int, seed: int) -> None:
        self._server = server
        self._random = random.Random(seed)
        config = read_config(
            {
                "KVCACHED_DIR": str(server.directory),
                "KVCACHED_HOST_POOL": str(pool_bytes),
                "KVCACHED_NAME": "neighbour",
            }
        )
        self._neighbour = Neighbour(config)
        source = random.Random(0)
        self._prefixes = [
            [source.randrange(3, 500) for _ in range(source.randrange(60, 250))]
            for _ in range(NUM_PREFIXES)
        ]
        self._answers: list[tuple[list[int], list[int]]] = []
        self.num_stopped = 0
        self.counts = dict.fromkeys(("answered", "aborted", "taken", "trims", "flushes"), 0)

    async def run(self, num_requests: int) -> None:
        """Have so many requests come, with all else in between, and wait for all answers."""
        async with self.client() as client:
            await self.round(client, range(num_requests))
        self.close()

    def client(self) -> httpx.AsyncClient:
        """Return what asks the server."""
        return httpx.AsyncClient(base_url=self._server.server.url, timeout=PATIENCE_SECONDS)

    async def round(self, client: httpx.AsyncClient, numbers: Iterable[int]) -> None:
        """Have requests of these numbers come, with all else in between; wait for all answers."""
        running: set[asyncio.Task[None]] = set()
        for number in numbers:
            running.add(asyncio.create_task(self._ask(client, str(number))))
            await self._happen(client, number)
            if len(running) >= MAX_RUNNING:
                running = await self._one_less(running)
        self._neighbour.give_back()
        await asyncio.gather(*running)

    async def _one_less(self, running: set[asyncio.Task[None]]) -> set[asyncio.Task[None]]:
        """Wait for an answer; if none comes, the neighbour gives back what all may wait for."""
        done, others = await asyncio.wait(
            running, timeout=STUCK_SECONDS, return_when=asyncio.FIRST_COMPLETED
        )
        if not done:
            self._neighbour.give_back()
            _, others = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        return others

    def close(self) -> None:
        """Leave the ledger."""
        self._neighbour.close()

    def check_again(self) -> None:
        """Ask some of it once more: the answers are the same."""
        for prompt, tokens in self._random.sample(self._answers, NUM_ASKED_AGAIN):
            assert self._server.ask(prompt, len(tokens)) == tokens

    async def _ask(self, client: httpx.AsyncClient, name: str) -> None:
        prefix = self._random.choice(self._prefixes)
        tail = [self._random.randrange(3, 500) for _ in range(self._random.randrange(1, 40))]
        prompt, num_tokens = prefix + tail, self._random.randrange(1, 16)
        answer = await client.post("/generate", json=body_of(prompt, num_tokens) | {"rid": name})
        answer.raise_for_status()
        found = answer.json()
        self.num_stopped += found["meta_info"].get("num_retractions", 0)
        if found["meta_info"]["finish_reason"]["type"] == "length":
            self.counts["answered"] += 1
            self._answers.append((prompt, found["output_ids"]))

    async def _happen(self, client: httpx.AsyncClient, number: int) -> None:
        chance = self._random.random()
        for act, share in self._acts(client, number):
            if chance < share:
                result = act()
                if result is not None:
                    await result
                return
            chance -= share

    def _acts(
        self, client: httpx.AsyncClient, number: int
    ) -> Iterator[tuple[Callable[[], Any], float]]:
        yield lambda: self._abort(client, number), 0.1
        yield self._take, 0.25
        yield lambda: self._neighbour.give_back(self._random.randrange(1, MAX_TAKEN_PAGES)), 0.25
        yield self._trim, 0.15
        yield lambda: self._flush(client), 0.08

    async def _abort(self, client: httpx.AsyncClient, number: int) -> None:
        name = str(self._random.randrange(max(number - MAX_RUNNING, 0), number + 1))
        (await client.post("/abort_request", json={"rid": name})).raise_for_status()
        self.counts["aborted"] += 1

    async def _flush(self, client: httpx.AsyncClient) -> None:
        """Flush the cache; SGLang refuses that while requests run."""
        await client.post("/flush_cache")
        self.counts["flushes"] += 1

    def _take(self) -> None:
        self._neighbour.take(self._random.randrange(1, MAX_TAKEN_PAGES))
        self.counts["taken"] += 1

    def _trim(self) -> None:
        trim([self._server.server.name], directory=self._server.directory, wait_seconds=0)
        self.counts["trims"] += 1


class LimitedRace(Race):
    """A race in which requests are stopped, too: for a limit below what they hold.

    The server's longest request has to fit below `LIMIT`.
    """

    LIMIT = "20MiB"

    def __init__(self, server: Raced, pool_bytes: int, seed: int) -> None:
        super().__init__(server, pool_bytes, seed)
        self.counts["limits"] = 0

    def close(self) -> None:
        """Leave the ledger, and no limit."""
        self._set_limit("none")
        super().close()

    def _acts(
        self, client: httpx.AsyncClient, number: int
    ) -> Iterator[tuple[Callable[[], Any], float]]:
        yield from super()._acts(client, number)
        yield lambda: self._set_limit(self.LIMIT), 0.07
        yield lambda: self._set_limit("none"), 0.07

    def _set_limit(self, limit: str) -> None:
        name, directory = self._server.server.name, self._server.directory
        changed = set_limit(name, limit, directory=directory, wait_seconds=0)
        assert changed.outcome is not Outcome.REFUSED, changed
        self.counts["limits"] += 1
