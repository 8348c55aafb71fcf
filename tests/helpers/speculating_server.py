"""A real SGLang server on a CPU that decodes speculatively, and what it says of its answers."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from helpers.engine_plugin import add_plugin
from helpers.hicache_server import body_of
from helpers.house import Neighbour
from helpers.sglang_engine import READY_SECONDS, random_prompts, start_sglang
from helpers.spoiled_planes import VARIABLE
from helpers.waiting import PATIENCE_SECONDS
from kvcached_core.config import read_config
from kvcached_core.units import MIB
from kvcached_demo.harness.server import EngineServer
from kvcached_demo.harness.servers import Servers

PAGE = 2 * MIB
POOL = 64 * MIB
NUM_PROMPTS, NUM_TOKENS, NUM_ANSWER_TOKENS = 6, 40, 24
# SGLang's attention on a CPU that knows drafts; its kernels are the tests'.
ATTENTION = tuple(f"--{phase}-attention-backend=intel_amx" for phase in ("prefill", "decode"))


@dataclass(frozen=True)
class Answer:
    """What a request got.

    Attributes:
        tokens: Its tokens.
        steps: How many steps looked at drafts.
        accepted: Tokens of drafts that were right.
        drafted: Those that were looked at.
        num_retractions: How often it went back to the queue.
    """

    tokens: list[int]
    steps: int
    accepted: int
    drafted: int
    num_retractions: int


class SpeculatingServer:
    """A server with drafts.

    Args:
        server: The server.
        servers: It and its neighbours.
        spoiled: The file that says whose keys are spoiled.
    """

    def __init__(self, server: EngineServer, servers: Servers, spoiled: Path) -> None:
        self.server, self.directory, self._spoiled = server, servers.directory, spoiled

    def ask(
        self, prompts: Sequence[Sequence[int]], num_tokens: int = NUM_ANSWER_TOKENS
    ) -> list[Answer]:
        """Ask all at once."""
        return asyncio.run(self.ask_all(prompts, num_tokens))

    async def ask_all(
        self, prompts: Sequence[Sequence[int]], num_tokens: int = NUM_ANSWER_TOKENS
    ) -> list[Answer]:
        """Ask all at once."""
        async with httpx.AsyncClient(base_url=self.server.url, timeout=PATIENCE_SECONDS) as client:
            asked = [client.post("/generate", json=body_of(one, num_tokens)) for one in prompts]
            return [_read(answer.json()) for answer in await asyncio.gather(*asked)]

    def flush(self) -> None:
        """Have nothing cached."""
        self.server.post("/flush_cache").raise_for_status()

    def neighbour(self) -> Neighbour:
        """Return an instance on its device, which takes and gives as a test says."""
        names = {"DIR": self.directory, "HOST_POOL": POOL, "NAME": "neighbour"}
        settings = {f"KVCACHED_{name}": str(value) for name, value in names.items()}
        return Neighbour(read_config(settings))

    @contextmanager
    def spoiling(self, whose: str) -> Iterator[None]:
        """Have the keys that the target, or the draft, has of its prompts be nothing."""
        self._spoiled.write_text(whose)
        try:
            yield
        finally:
            self._spoiled.unlink()


def prompts(seed: int, number: int = NUM_PROMPTS, num_tokens: int = NUM_TOKENS) -> list[list[int]]:
    """Return prompts of random tokens."""
    return random_prompts(seed, number, num_tokens)


@contextmanager
def speculating_server(
    model: Path, workspace: Path, *arguments: str, elastic: bool = True
) -> Iterator[SpeculatingServer]:
    """Run a server with drafts; at the end it has to be alive, and to have told of no leak."""
    workspace.mkdir(parents=True, exist_ok=True)
    spoiled = workspace / "spoiled"
    variables = add_plugin(workspace / "plugin", "helpers.spoiled_planes")
    variables |= {VARIABLE: str(spoiled)} | ({"KVCACHED_DEBUG": "1"} if elastic else {})
    variables["TORCHDYNAMO_DISABLE"] = "1"  # to compile small functions takes a minute
    with Servers(workspace, POOL) as servers:
        server = start_sglang(
            servers,
            "drafting",
            model,
            *ATTENTION,
            *arguments,
            elastic=elastic,
            page_bytes=PAGE,
            pool_bytes=POOL,
            variables=variables
            | {VARIABLE: str(spoiled)}
            | ({"KVCACHED_DEBUG": "1"} if elastic else {}),
        )
        server.wait_ready(READY_SECONDS)
        yield SpeculatingServer(server, servers, spoiled)
        log = server.log.read_text()
        assert server.process.poll() is None, log[-4000:]
    assert "leak detected" not in log
    assert ("kvcached: process" in log) == elastic


def _read(answer: Any) -> Answer:
    said = answer["meta_info"]
    assert said["finish_reason"]["type"] == "length", said
    return Answer(
        answer["output_ids"],
        said["spec_verify_ct"],
        said["spec_num_correct_drafts"],
        said["spec_num_proposed_drafts"],
        said.get("num_retractions", 0),
    )
