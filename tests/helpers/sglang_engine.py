"""Real SGLang servers on a CPU, and what they are asked."""

import asyncio
import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from helpers.process_memory import resident_bytes
from helpers.warm_servers import WarmSGLangServer
from kvcached_core.control import Outcome, trim
from kvcached_core.units import MIB
from kvcached_demo.harness.load import Burst, make_burst
from kvcached_demo.harness.server import EngineServer, SGLangServer

Answers = list[tuple[str | None, list[int]]]
Models = Callable[[Callable[[], Any]], Path]
Vanilla = Callable[..., Answers]

POOL = 512 * MIB
POOL_TOKENS = 16 * 1024  # 32 KiB each
ADDRESSES = re.compile(r"process (\d+) has addresses (0x[0-9a-f]+) to (0x[0-9a-f]+)")
NUM_BURSTS = 10
READY_SECONDS = 200.0
NUM_SHORT_TOKENS = 80
NUM_ANSWER_TOKENS = 8


def start_sglang(
    name: str,
    model: Path,
    workspace: Path,
    *arguments: str,
    elastic: bool = True,
    core: int = 0,
    num_ranks: int = 1,
    cold: bool = False,
) -> SGLangServer:
    """Start a server that believes to have the whole pool.

    It is forked from a parent that has imported SGLang, or started as users do if it is `cold`.
    """
    environ = {
        "KVCACHED_DIR": str(workspace / "kv"),
        "KVCACHED_HOST_POOL": str(POOL),
        "ENABLE_KVCACHED": "0",
        "TRITON_INTERPRET": "1",  # 0.5.15 extends prompts in blocks of several tokens by a kernel
    }
    if num_ranks > 1:
        # On a CPU each rank wants a NUMA node, or to be told its cores.
        environ["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(str(rank) for rank in range(num_ranks))
    flags = ("--enable-kvcached", "--kvcached-name", name) if elastic else ()
    kind = SGLangServer if cold else WarmSGLangServer
    return kind(
        name,
        model,
        workspace,
        environ=environ,
        arguments=(
            *("--max-total-tokens", str(POOL_TOKENS), "--max-running-requests", "16"),
            *("--mem-fraction-static", "0.3", "--tp-size", str(num_ranks)),
            *arguments,
            *flags,
        ),
        core=core,
    )


@contextmanager
def elastic_server(
    model: Path, workspace: Path, *arguments: str, cold: bool = False
) -> Iterator[SGLangServer]:
    """Run a server with kvcached; at the end its log has to say that it is, and of no leak."""
    server = start_sglang("elastic", model, workspace, *arguments, cold=cold)
    try:
        server.wait_ready(READY_SECONDS)
        yield server
        log = server.log.read_text()
        assert server.process.poll() is None
    finally:
        server.kill()
    assert "kvcached: process" in log
    assert "leak detected" not in log


def vanilla_answers(
    model: Path, workspace: Path, bursts: Sequence[Burst], *arguments: str
) -> Answers:
    """Return what a server without kvcached answers."""
    server = start_sglang("vanilla", model, workspace, *arguments, elastic=False, core=1)
    try:
        server.wait_ready(READY_SECONDS)
        found = answers(server, bursts)
    finally:
        server.kill()
    assert "kvcached: process" not in server.log.read_text()
    assert {error for error, _ in found} == {None}
    return found


def trims_to(server: EngineServer, directory: Path, num_bytes: int) -> bool:
    """Return whether a trim leaves it so much at most; right behind an answer more is in use."""
    (trimmed,) = trim([], directory=directory, wait_seconds=5)
    assert trimmed.outcome is Outcome.APPLIED
    return resident_by_proc(server) == trimmed.after_bytes <= num_bytes


def resident_by_proc(server: EngineServer) -> int:
    """Return what the kernel says of the server's KV range."""
    return resident_of_ranks(server)[-1]


def resident_of_ranks(server: EngineServer) -> list[int]:
    """Return what the kernel says of each rank's KV range."""
    return [
        resident_bytes(int(start, 16), int(end, 16) - int(start, 16), pid)
        for pid, start, end in ADDRESSES.findall(server.log.read_text())
    ]


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
        bursts.append(Burst(tuple(prompts), 4 + 2 * number))
    return bursts


def short_bursts() -> list[Burst]:
    """Return the same prompts, cut for servers that interpret a kernel."""
    return [
        Burst(tuple(prompt[-NUM_SHORT_TOKENS:] for prompt in burst.prompts), NUM_ANSWER_TOKENS)
        for burst in mixed_bursts()
    ]


def _tokens(source: random.Random) -> tuple[int, ...]:
    return tuple(source.randrange(3, 500) for _ in range(source.randrange(1, 400)))


def large_burst(seed: int) -> Burst:
    """Return a burst that needs about 70 % of the pool."""
    num_requests, num_output_tokens = 12, 64
    num_tokens = int(POOL_TOKENS * 0.7 / num_requests)
    return make_burst(
        num_requests=num_requests,
        num_prompt_tokens=num_tokens - num_output_tokens,
        num_output_tokens=num_output_tokens,
        seed=seed,
    )
