"""A SGLang server that publishes KV events, its mirror, and races in which both stay equal."""

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx

from helpers.engine_plugin import add_plugin
from helpers.hicache_race import Race
from helpers.hicache_server import body_of
from helpers.kv_mirror import Mirror
from helpers.sglang_engine import READY_SECONDS, start_sglang
from helpers.tree_reports import FOLDER, QUESTION, REPORT, write
from helpers.waiting import PATIENCE_SECONDS, await_that
from kvcached_core.control import Outcome, trim
from kvcached_core.units import MIB
from kvcached_demo.harness.server import EngineServer, free_port
from kvcached_demo.harness.servers import Servers

PAGE = 2 * MIB
NUM_REQUESTS = 20


class EventsServer:
    """A server that publishes KV events.

    Attributes:
        server: The server.
        directory: The folder of the ledgers.
        mirror: What the events say.
        prompts: All that was asked, with the answers.

    Args:
        server: The server.
        servers: It and its neighbours.
        folder: Where it says what is in its cache.
        mirror: What the events say.
    """

    def __init__(
        self, server: EngineServer, servers: Servers, folder: Path, mirror: Mirror
    ) -> None:
        self.server, self.directory, self.mirror = server, servers.directory, mirror
        self.prompts: list[list[int]] = []
        self._folder = folder

    def ask(self, prompt: Sequence[int], num_tokens: int = 8) -> list[int]:
        """Return the tokens of an answer."""
        answer = self.server.post("/generate", body_of(prompt, num_tokens), PATIENCE_SECONDS)
        answer.raise_for_status()
        found: list[int] = answer.json()["output_ids"]
        self.prompts.append([*prompt, *found])
        return found

    def begin(self) -> None:
        """Wait until the mirror hears the server; from then on it misses nothing."""

        def hears() -> bool:
            self.server.post("/flush_cache").raise_for_status()
            return self.mirror.listen()

        await_that(hears)

    def trim(self) -> int:
        """Have it give once what no request needs; return what is resident then, in bytes."""
        name, directory = self.server.name, self.directory
        (trimmed,) = trim([name], directory=directory, wait_seconds=PATIENCE_SECONDS)
        assert trimmed.outcome is Outcome.APPLIED
        assert trimmed.after_bytes is not None
        return trimmed.after_bytes

    def report(self) -> dict[str, Any]:
        """Return what the scheduler says of its cache: see `tree_reports`."""
        report = self._folder / REPORT
        report.unlink(missing_ok=True)
        write(self._folder / QUESTION, self.prompts)
        await_that(report.exists)
        found: dict[str, Any] = json.loads(report.read_text())
        return found

    def told(self) -> dict[str, Any]:
        """Return the same as the mirror has it."""
        self.mirror.listen()
        return {
            "num_found": [self.mirror.num_found(prompt) for prompt in self.prompts],
            "num_tokens": self.mirror.num_tokens,
        }

    def check(self) -> int:
        """See that the mirror becomes what the cache is; return how many tokens that has.

        No request may run. What was published is on its way for a while.
        """
        report = self.report()
        try:
            await_that(lambda: self.told() == report)
        except AssertionError:
            assert self.told() == report  # it says how they differ
        num_tokens: int = report["num_tokens"]
        return num_tokens


@contextmanager
def events_server(
    model: Path, workspace: Path, *arguments: str, pool_bytes: int, **settings: str
) -> Iterator[EventsServer]:
    """Run a server that publishes KV events; at the end it has to be alive, and to know no leak."""
    folder = workspace / "reports"
    folder.mkdir(parents=True)
    port = free_port()
    mirror = Mirror(f"tcp://127.0.0.1:{port}")
    events = {"publisher": "zmq", "endpoint": f"tcp://*:{port}", "topic": "kv-events"}
    with closing(mirror), Servers(workspace, pool_bytes) as servers:
        server = start_sglang(
            servers,
            "published",
            model,
            *("--kv-events-config", json.dumps(events)),
            *arguments,
            pool_bytes=pool_bytes,
            page_bytes=PAGE,
            variables=add_plugin(workspace / "plugin", "helpers.tree_reports")
            | {FOLDER: str(folder), "KVCACHED_DEBUG": "1", **settings},
        )
        server.wait_ready(READY_SECONDS)
        yield EventsServer(server, servers, folder, mirror)
        log = server.log.read_text()
        assert server.process.poll() is None, log[-4000:]
    assert "leak detected" not in log
    assert "kvcached: process" in log


class EventsRace(Race):
    """A race with quiet points, at each of which the mirror is what the cache is.

    Attributes:
        num_operations: How much happened.
        num_checks: How often both were compared.
    """

    def __init__(self, server: EventsServer, pool_bytes: int, seed: int) -> None:
        super().__init__(server, pool_bytes, seed)
        self._published = server
        self._source = random.Random(seed)
        self.counts |= dict.fromkeys(("sleeps", "pauses", "quiet_flushes"), 0)
        self.num_checks = 0
        self._num_requests = 0

    @property
    def num_operations(self) -> int:
        """How much happened: requests, and what moved memory or the cache."""
        return self._num_requests + sum(self.counts.values()) - self.counts["answered"]

    async def run(self, num_operations: int) -> None:
        """Go on until so much happened."""
        async with self.client() as client:
            while self.num_operations < num_operations:
                numbers = range(self._num_requests, self._num_requests + NUM_REQUESTS)
                self._num_requests = numbers.stop
                await self.round(client, numbers)
                self._check()
                await self._source.choice((self._sleep, self._pause, self._flush_all))(client)
                self._check()
        self.close()

    def _check(self) -> None:
        self._published.prompts = [[*prompt, *tokens] for prompt, tokens in self._answers]
        self._published.check()
        self.num_checks += 1

    async def _sleep(self, client: httpx.AsyncClient) -> None:
        body = {"tags": ["kv_cache"]}
        (await client.post("/release_memory_occupation", json=body)).raise_for_status()
        self._check()
        (await client.post("/resume_memory_occupation", json=body)).raise_for_status()
        self.counts["sleeps"] += 1

    async def _pause(self, client: httpx.AsyncClient) -> None:
        """Have memory go while the loop is paused, which schedules nothing then."""
        (await client.post("/pause_generation", json={"mode": "in_place"})).raise_for_status()
        self._published.trim()
        self._check()
        (await client.post("/continue_generation", json={})).raise_for_status()
        self.counts["pauses"] += 1

    async def _flush_all(self, client: httpx.AsyncClient) -> None:
        (await client.post("/flush_cache")).raise_for_status()
        self.counts["quiet_flushes"] += 1
