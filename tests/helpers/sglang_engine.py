"""Real SGLang servers on a CPU, and what they are asked."""

import asyncio
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from helpers.process_memory import resident_by_proc
from helpers.waiting import PATIENCE_SECONDS
from helpers.warm_servers import launch_warm
from kvcached_core.control import Outcome, trim
from kvcached_core.units import MIB
from kvcached_demo.harness.engines import SGLANG
from kvcached_demo.harness.load import Burst, make_burst
from kvcached_demo.harness.model import KV_BYTES_PER_TOKEN
from kvcached_demo.harness.server import EngineServer, start_cold
from kvcached_demo.harness.servers import Servers

Answers = list[tuple[str | None, list[int]]]
Models = Callable[[Callable[[], Any]], Path]
Vanilla = Callable[..., Answers]

POOL = 512 * MIB
PAGE_BYTES = 16 * MIB  # the default
NUM_BURSTS = 10
READY_SECONDS = PATIENCE_SECONDS
NUM_SHORT_PROMPTS = 4
NUM_SHORT_TOKENS = 40
NUM_ANSWER_TOKENS = 4


def start_sglang(
    servers: Servers,
    name: str,
    model: Path,
    *arguments: str,
    elastic: bool = True,
    num_ranks: int = 1,
    cold: bool = False,
    page_bytes: int = PAGE_BYTES,
    pool_bytes: int = POOL,
    variables: Mapping[str, str] | None = None,
) -> EngineServer:
    """Start a server that believes to have the whole pool.

    It is forked from a parent that has imported SGLang, or started as users do if it is `cold`.
    """
    # 0.5.15 extends prompts in blocks of several tokens by a kernel.
    environ = {"TRITON_INTERPRET": "1"} | cores_of(num_ranks) | dict(variables or {})
    if page_bytes != PAGE_BYTES:
        environ["KVCACHED_PAGE_BYTES"] = str(page_bytes)
    return servers.start(
        SGLANG,
        name,
        model,
        *SGLANG.size(pool_bytes, KV_BYTES_PER_TOKEN, is_elastic=elastic, is_host=True),
        *SGLANG.running(16),
        *("--tp-size", str(num_ranks)),
        *arguments,
        is_elastic=elastic,
        environ=environ,
        launch=start_cold if cold else launch_warm,
    )


def cores_of(num_ranks: int) -> dict[str, str]:
    """Return what tells each of several ranks its core: on a CPU it would want a NUMA node."""
    if num_ranks == 1:
        return {}
    return {"SGLANG_CPU_OMP_THREADS_BIND": "|".join(str(rank) for rank in range(num_ranks))}


@contextmanager
def elastic_server(
    model: Path,
    workspace: Path,
    *arguments: str,
    cold: bool = False,
    page_bytes: int = PAGE_BYTES,
) -> Iterator[EngineServer]:
    """Run a server with kvcached; at the end its log has to say that it is, and of no leak."""
    with Servers(workspace, POOL) as servers:
        server = start_sglang(
            servers, "elastic", model, *arguments, cold=cold, page_bytes=page_bytes
        )
        server.wait_ready(READY_SECONDS)
        yield server
        log = server.log.read_text()
        assert server.process.poll() is None
    assert "kvcached: process" in log
    assert "leak detected" not in log


def vanilla_answers(
    model: Path, workspace: Path, bursts: Sequence[Burst], *arguments: str
) -> Answers:
    """Return what a server without kvcached answers."""
    with Servers(workspace, POOL) as servers:
        server = start_sglang(servers, "vanilla", model, *arguments, elastic=False)
        server.wait_ready(READY_SECONDS)
        found = answers(server, bursts)
    assert "kvcached: process" not in server.log.read_text()
    assert {error for error, _ in found} == {None}
    return found


def trims_to(server: EngineServer, directory: Path, num_bytes: int) -> bool:
    """Return whether a trim leaves it so much at most; right behind an answer more is in use."""
    (trimmed,) = trim([], directory=directory, wait_seconds=PATIENCE_SECONDS)
    assert trimmed.outcome is Outcome.APPLIED
    return resident_by_proc(server) == trimmed.after_bytes <= num_bytes


def post(url: str, words: dict[str, Any] | None = None) -> None:
    """Call what a server has for its operators, and wait for its answer."""
    httpx.post(url, json=words, timeout=PATIENCE_SECONDS).raise_for_status()


def answers(server: EngineServer, bursts: Sequence[Burst]) -> Answers:
    """Send one burst after the other; return the error and the tokens of each request."""
    return [
        (completion.error, completion.token_ids)
        for burst in bursts
        for completion in asyncio.run(server.send(burst))
    ]


def mixed_bursts() -> list[Burst]:
    """Return 60 prompts in ten bursts: short and long ones, some with a prefix in common."""
    source = random.Random(5)
    shared = [source.randrange(3, 500) for _ in range(300)]
    bursts = []
    for number in range(NUM_BURSTS):
        prompts = [
            (*shared[: source.randrange(0, 300) * (index % 2)], *_tokens(source))
            for index in range(6)
        ]
        bursts.append(Burst(tuple(prompts), 4 + number))
    return bursts


def random_prompts(seed: int, number: int, num_tokens: int) -> list[list[int]]:
    """Return prompts that share nothing with each other or with those of another seed."""
    source = random.Random(seed)
    return [[source.randrange(3, 500) for _ in range(num_tokens)] for _ in range(number)]


def short_bursts() -> list[Burst]:
    """Return some of the same prompts, cut for servers that interpret a kernel."""
    return [
        Burst(
            tuple(prompt[-NUM_SHORT_TOKENS:] for prompt in burst.prompts[:NUM_SHORT_PROMPTS]),
            NUM_ANSWER_TOKENS,
        )
        for burst in mixed_bursts()
    ]


def _tokens(source: random.Random) -> tuple[int, ...]:
    return tuple(source.randrange(3, 500) for _ in range(source.randrange(1, 400)))


def large_burst(seed: int, pool_bytes: int) -> Burst:
    """Return a burst that needs about 70 % of a pool."""
    num_requests, num_output_tokens = 12, 64
    num_tokens = int(pool_bytes // KV_BYTES_PER_TOKEN * 0.7 / num_requests)
    return make_burst(
        num_requests=num_requests,
        num_prompt_tokens=num_tokens - num_output_tokens,
        num_output_tokens=num_output_tokens,
        seed=seed,
    )
