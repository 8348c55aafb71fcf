"""A real SGLang server whose blocks are copied to the host, and what is done to it.

Nothing of SGLang stands in here but its copier (`hicache_copier`).
"""

import asyncio
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from helpers.engine_plugin import add_plugin
from helpers.hicache_copier_settings import DELAY_MS, GATE, REPORT, SEED, SPOILED
from helpers.process_memory import resident_by_proc
from helpers.sglang_engine import POOL, READY_SECONDS, start_sglang
from helpers.waiting import PATIENCE_SECONDS, await_that
from kvcached_core.config import Config, read_config
from kvcached_core.control import Outcome, devices, trim
from kvcached_core.ledger.view import InstanceView
from kvcached_core.units import MIB
from kvcached_core.weights.host_budget import HostBudget
from kvcached_core.weights.host_tier import TierCounts, TierView, read_tiers
from kvcached_demo.harness.server import EngineServer
from kvcached_demo.harness.servers import Servers

TIER = (
    "--enable-hierarchical-cache",
    *("--hicache-size", "1"),
    *("--hicache-mem-layout", "layer_first"),
)
PAGE = 16 * MIB


class HiCacheServer:
    """One server with a host tier.

    Args:
        server: The server.
        servers: It and its neighbours.
        folder: Where the copier reports, and is told what to do.
        num_ranks: How many ranks share the model.
    """

    def __init__(
        self, server: EngineServer, servers: Servers, folder: Path, num_ranks: int = 1
    ) -> None:
        self.least_bytes = num_ranks * PAGE
        self.server, self.directory, self.folder = server, servers.directory, folder
        self.gate, self.spoiled = folder / "gate", folder / "spoiled"

    def ask(self, prompt: Sequence[int], num_tokens: int = 8) -> list[int]:
        """Return the tokens of an answer."""
        return self.answer(prompt, num_tokens)[0]

    def answer(self, prompt: Sequence[int], num_tokens: int = 8) -> tuple[list[int], Any]:
        """Return the tokens of an answer, and what SGLang says of it."""
        answer = self.server.post("/generate", body_of(prompt, num_tokens), PATIENCE_SECONDS)
        answer.raise_for_status()
        return answer.json()["output_ids"], answer.json()["meta_info"]

    def copied(self) -> dict[str, Any]:
        """Return what the copier says that it did."""
        found: dict[str, Any] = json.loads((self.folder / "copied.json").read_text())
        assert found["fault"] == ""
        return found

    def counts(self) -> TierCounts:
        """Return what everybody sees of the tier."""
        (view,) = self.tiers()
        return view.counts[0]

    def tiers(self) -> list[TierView]:
        """Return what everybody sees of the tiers of all ranks."""
        return read_tiers(HostBudget(self.config).folder)

    @property
    def config(self) -> Config:
        """The settings of who shares its device."""
        return read_config({"KVCACHED_DIR": str(self.directory), "KVCACHED_HOST_POOL": str(POOL)})

    def settle(self, num_rows: int) -> None:
        """Wait until so many rows were stored since the start."""
        await_that(lambda: self._stored_rows() >= num_rows)

    def _stored_rows(self) -> int:
        with suppress(FileNotFoundError):
            return int(self.copied()["stored_rows"])
        return 0

    def trim(self) -> int:
        """Have it give once what no request needs; return what is resident then."""
        (trimmed,) = trim([], directory=self.directory, wait_seconds=PATIENCE_SECONDS)
        assert trimmed.outcome is Outcome.APPLIED
        assert trimmed.after_bytes is not None
        return trimmed.after_bytes

    def view(self) -> InstanceView:
        """Return what everybody sees of it in the ledger."""
        ((view,),) = [found.instances for found in devices(self.directory)]
        return view

    def lose_cache(self) -> None:
        """Have it give all but page 0; right behind an answer more is in use."""
        await_that(lambda: self.trim() == self.least_bytes)
        assert resident_by_proc(self.server) == PAGE  # of one rank

    @contextmanager
    def copies_left_open(self) -> Iterator[None]:
        """Let no copy end in the block until somebody waits for one."""
        self.gate.touch()
        try:
            yield
        finally:
            self.gate.unlink(missing_ok=True)

    @contextmanager
    def loads_spoiled(self, pool: str = "") -> Iterator[None]:
        """Have what is loaded in the block, of one pool or of all, hold other tokens' bytes."""
        self.spoiled.write_text(pool)
        try:
            yield
        finally:
            self.spoiled.unlink()

    @contextmanager
    def running(self, prompt: Sequence[int], num_tokens: int) -> Iterator[dict[str, Any]]:
        """Have a request run in the block; what SGLang says of it is there behind the block."""
        said: dict[str, Any] = {}
        body = body_of(prompt, num_tokens) | {"rid": "runner", "stream": True}
        with (
            httpx.Client(base_url=self.server.url, timeout=PATIENCE_SECONDS) as client,
            client.stream("POST", "/generate", json=body) as answer,
        ):
            lines = answer.iter_lines()
            next(lines)
            yield said
            client.post("/abort_request", json={"rid": "runner"}).raise_for_status()
            (*_, last) = (line for line in lines if "meta_info" in line)
            said |= json.loads(last.removeprefix("data:"))["meta_info"]


def body_of(prompt: Sequence[int], num_tokens: int) -> dict[str, Any]:
    """Return what SGLang is asked."""
    sampling = {"max_new_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
    return {"input_ids": list(prompt), "sampling_params": sampling}


@contextmanager
def hicache_server(
    model: Path,
    workspace: Path,
    *arguments: str,
    elastic: bool = True,
    pool_bytes: int = POOL,
    delay_ms: tuple[float, float] = (5, 20),
    seed: int = 0,
    num_ranks: int = 1,
    **settings: str,
) -> Iterator[HiCacheServer]:
    """Run a server with a host tier; at the end it has to be alive, and to have told of no leak."""
    folder = workspace / "copier"
    folder.mkdir(parents=True)
    variables = add_plugin(workspace / "plugin", "helpers.hicache_plugin") | {
        DELAY_MS: ",".join(map(str, delay_ms)),
        SEED: str(seed),
        REPORT: str(folder / "copied.json"),
        GATE: str(folder / "gate"),
        SPOILED: str(folder / "spoiled"),
        "KVCACHED_DEBUG": "1",
        **settings,
    }
    with Servers(workspace, pool_bytes) as servers:
        server = start_sglang(
            servers,
            "tiered",
            model,
            *TIER,
            *arguments,
            elastic=elastic,
            variables=variables,
            num_ranks=num_ranks,
        )
        server.wait_ready(READY_SECONDS)
        yield HiCacheServer(server, servers, folder, num_ranks)
        log = server.log.read_text()
        assert server.process.poll() is None, log[-4000:]
    assert "leak detected" not in log
    assert ("kvcached: process" in log) == elastic


async def ask_all(url: str, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[Any]:
    """Return what all prompts at once are answered."""
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_SECONDS) as client:
        asked = [client.post("/generate", json=body_of(one, num_tokens)) for one in prompts]
        return [answer.json()["output_ids"] for answer in await asyncio.gather(*asked)]
