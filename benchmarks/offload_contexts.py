"""Conversations whose contexts together are four times the device's KV memory, on a GPU.

    python benchmarks/offload_contexts.py --json benchmarks/results/gpu/offload_contexts.json

One server after the other, elastic ones with a host tier (`tier`) and without (`plain`), answers
the same conversations for as long. On two cards both modes run at once: `--modes plain` with a
record of its own on one, `--modes tier --beside` that record on the other. Each begins with a long
text and asks again as soon as it has its answer; after some turns it begins anew. So all of them
wait for memory most of the time. A turn counts as good if its first token came within
`--goal-seconds` of being sent.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from parts.record import Record
from parts.vllm_servers import PREEMPTIONS, READY_SECONDS, Setting, bench_run, parser

from kvcached_core.units import GIB, MIB
from kvcached_demo.harness.engines import VLLM
from kvcached_demo.harness.load import FIRST_PLAIN_TOKEN, VOCABULARY, Burst, Completion
from kvcached_demo.harness.server import EngineServer

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers.offload_plugin import add_plugin, transfer

TIER, PLAIN = "tier", "plain"
MODES = (TIER, PLAIN)
TIMES_MEMORY = 4
LOOK_SECONDS = 30.0
BESIDE_SECONDS = 120.0  # how long a mode that runs at the same time is waited for
HITS = "vllm:external_prefix_cache_hits_total"
LOADED = "vllm:kv_offload_load_bytes_total"


@dataclass(frozen=True)
class Turn:
    """What became of one turn of a conversation."""

    conversation: int
    number: int
    num_tokens: int
    sent_seconds: float
    ttft_seconds: float | None
    seconds: float
    error: str | None


class Sizes:
    """How much of everything, on a GPU or in a rehearsal."""

    def __init__(self, options: argparse.Namespace, kv_bytes_per_token: int) -> None:
        tiny = options.tiny
        self.server_options: tuple[str, ...] = tuple(shlex.split(options.server_options))
        self.kv_bytes = 64 * MIB if tiny else options.kv_gib * GIB
        self.tier_bytes = 512 * MIB if tiny else options.tier_gib * GIB
        self.context_tokens = 320 if tiny else options.context_tokens
        self.turn_tokens = 16 if tiny else 64
        self.answer_tokens = 16 if tiny else 128
        self.num_turns = 4
        memory_tokens = self.kv_bytes // kv_bytes_per_token
        self.num_conversations = -(-TIMES_MEMORY * memory_tokens // self.context_tokens)
        self.longest_tokens = self.context_tokens + (self.num_turns + 1) * (
            self.turn_tokens + self.answer_tokens
        )


class Conversation:
    """One client: it asks, waits for the answer, and asks on."""

    def __init__(self, number: int, sizes: Sizes) -> None:
        self.number, self._sizes = number, sizes
        self._random = random.Random(number)
        self._text = self._tokens(sizes.context_tokens)

    async def run(self, server: EngineServer, end: float, turns: list[Turn]) -> None:
        """Take turns until the time is up; what is under way then is finished."""
        started = time.monotonic()
        context: tuple[int, ...] = ()
        for number in itertools.count():
            if time.monotonic() >= end:
                return
            if number % self._sizes.num_turns == 0:
                context = self._text
            context += self._tokens(self._sizes.turn_tokens)
            sent = time.monotonic()
            (answer,) = await server.send(Burst((context,), self._sizes.answer_tokens))
            turns.append(self._turn(number, len(context), answer, sent - started, sent))
            context += tuple(answer.token_ids)

    def _turn(
        self, number: int, num_tokens: int, answer: Completion, sent_seconds: float, sent: float
    ) -> Turn:
        error = answer.error
        if error is None and len(answer.token_ids) != self._sizes.answer_tokens:
            error = f"{len(answer.token_ids)} of {self._sizes.answer_tokens} tokens"
        seconds = time.monotonic() - sent
        return Turn(
            self.number, number, num_tokens, sent_seconds, answer.ttft_seconds, seconds, error
        )

    def _tokens(self, number: int) -> tuple[int, ...]:
        return tuple(self._random.randrange(FIRST_PLAIN_TOKEN, VOCABULARY) for _ in range(number))


@contextlib.contextmanager
def server_of(mode: str, setting: Setting, sizes: Sizes) -> Iterator[EngineServer]:
    """Serve with a tier or without, alone on the device."""
    servers, tiny = setting.servers, setting.tiny
    tier: tuple[str, ...] = ()
    if mode == TIER and tiny:
        spec = transfer(num_bytes=sizes.tier_bytes, delay_ms=(0, 1))
        tier = ("--kv-transfer-config", json.dumps(spec))
    elif mode == TIER:
        tier = ("--kv-offloading-size", str(sizes.tier_bytes // GIB))
    server = servers.start(
        VLLM,
        mode,
        setting.model,
        *VLLM.caching(is_on=True),
        *VLLM.size(
            sizes.kv_bytes, setting.kv_bytes_per_token, is_elastic=True, is_host=setting.tiny
        ),
        *VLLM.longest(512 if tiny else sizes.longest_tokens),
        *tier,
        *sizes.server_options,
        is_elastic=True,
        limit_bytes=sizes.kv_bytes,
        options=setting.options,
        environ=setting.environ | (add_plugin(servers.workspace / "plugin") if tiny else {}),
    )
    servers.wait_ready(mode, seconds=READY_SECONDS)
    try:
        yield server
    finally:
        server.stop()


async def talk(
    server: EngineServer, sizes: Sizes, seconds: float, look: Callable[[list[Turn], float], None]
) -> None:
    """Hold all conversations; have their turns looked at once in a while, and at the end."""
    turns: list[Turn] = []
    started = time.monotonic()

    async def look_on() -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            look(turns, time.monotonic() - started)

    looking = asyncio.create_task(look_on())
    conversations = (Conversation(number, sizes) for number in range(sizes.num_conversations))
    await asyncio.gather(*(one.run(server, started + seconds, turns) for one in conversations))
    looking.cancel()
    look(turns, time.monotonic() - started)


def figures(turns: list[Turn], seconds: float, goal_seconds: float) -> dict[str, Any]:
    """Return what a mode came to."""
    answered = [turn for turn in turns if turn.error is None]
    ttft = sorted(turn.ttft_seconds or 0.0 for turn in answered)
    num_good = sum(each <= goal_seconds for each in ttft)
    return {
        "seconds": seconds,
        "num_turns": len(turns),
        "num_failed": len(turns) - len(answered),
        "turns_per_second": len(answered) / seconds,
        "goodput": num_good / seconds,
        "ttft_seconds": {
            "median": statistics.median(ttft),
            "p99": ttft[int(len(ttft) * 0.99)],
        },
    }


def measure(
    mode: str, setting: Setting, record: Record, sizes: Sizes, options: argparse.Namespace
) -> None:
    """Run one mode; record its figures and its turns, also while it runs: it may be cut off."""
    with server_of(mode, setting, sizes) as server:

        def look(turns: list[Turn], seconds: float) -> None:
            if not any(turn.error is None for turn in turns):
                return
            found = figures(turns, seconds, options.goal_seconds)
            found["preemptions"] = server.metric(PREEMPTIONS)
            if mode == TIER:
                found |= {"hit_tokens": server.metric(HITS), "loaded_bytes": server.metric(LOADED)}
            print(f"{mode}: {found}", flush=True)
            record.add(**{mode: found | {"turns": [asdict(turn) for turn in turns]}})

        asyncio.run(talk(server, sizes, options.seconds, look))


def ratios(record: Record) -> None:
    """Note how a tier compares."""
    with_tier, without = (record.results[mode] for mode in MODES)
    for name in ("turns_per_second", "goodput"):
        ratio = with_tier[name] / without[name] if without[name] else None
        record.add(**{f"{name}_ratio": ratio})
        print(f"{name}: {with_tier[name]:.3f} and {without[name]:.3f}, ratio {ratio}", flush=True)


def found_beside(path: Path, modes: list[str], seconds: float) -> dict[str, Any]:
    """Return modes of another record; one that runs at the same time is waited for."""
    deadline = time.monotonic() + BESIDE_SECONDS
    while True:
        beside = json.loads(path.read_text())
        found = {mode: beside[mode] for mode in modes if mode in beside}
        is_done = len(found) == len(modes) and all(
            one["seconds"] >= seconds for one in found.values()
        )
        if is_done or time.monotonic() > deadline:
            return found
        time.sleep(1.0)


def main() -> None:
    """Measure, print, write JSON."""
    arguments = parser(__doc__)
    arguments.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    arguments.add_argument("--beside", type=Path, help="the record of the other mode")
    arguments.add_argument("--seconds", type=float, default=480.0, help="of each mode")
    arguments.add_argument("--kv-gib", type=int, default=12, help="KV memory")
    arguments.add_argument("--tier-gib", type=int, default=56, help="host tier")
    arguments.add_argument("--context-tokens", type=int, default=16_000)
    arguments.add_argument("--goal-seconds", type=float, default=10.0)
    arguments.add_argument("--server-options", default="", help="words for the server")
    options = arguments.parse_args()
    with bench_run(options) as (setting, record):
        sizes = Sizes(options, setting.kv_bytes_per_token)
        record.add(sizes=vars(sizes), goal_seconds=options.goal_seconds)
        print(f"{sizes.num_conversations} conversations", flush=True)
        for mode in options.modes:
            measure(mode, setting, record, sizes, options)
        if options.beside:
            others = [mode for mode in MODES if mode not in options.modes]
            record.add(**found_beside(options.beside, others, options.seconds))
        if all(mode in record.results for mode in MODES):
            ratios(record)


if __name__ == "__main__":
    main()
