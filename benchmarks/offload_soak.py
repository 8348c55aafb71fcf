"""Copies to the host while a neighbour asks for memory five times a second, for half an hour.

    python benchmarks/offload_soak.py --json benchmarks/results/gpu/offload_soak.json

One elastic server with a host tier answers clients that come back with prompts that they had
before, and some hang up on an answer. Meanwhile it is asked for a random part of its cache every
200 ms. At the end it has to live, every answer that nobody hung up on has to be whole, its log has
to be without errors, and prompts of the beginning are answered as then.
"""

import argparse
import asyncio
import contextlib
import random
import re
import shlex
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx
from parts.hanging_up import ask
from parts.offload_servers import Bench, Sizes
from parts.record import Record
from parts.vllm_servers import PREEMPTIONS, bench_run, parser
from vllm_overhead import ELASTIC

from kvcached_core.ledger import bell
from kvcached_core.ledger.ledger import Ledger
from kvcached_demo.harness.server import EngineServer

ASK_EVERY_SECONDS = 0.2
LOOK_SECONDS = 30.0
ABORTED_PART, KNOWN_PART = 0.15, 0.5  # of the requests
MAX_KNOWN = 64  # prompts that may come again
MAX_ERRORS = 9  # that are written down
NUM_CHECKED, CHECKED_TOKENS = 4, 16
# What they need at once, 9 GiB of 12, leaves cached memory to ask for, and now and then none.
NUM_CLIENTS, TINY_CLIENTS = 16, 6
# What no log may say.
WRONG = re.compile(r"CUDA error|Xid|illegal memory|SIGSEGV|UnmappedBlockError|AssertionError")


@dataclass
class Soak:
    """What is going on, and what became of it.

    Attributes:
        bench: The server.
        source: Of all that is random.
        counts: Requests and asks by what became of them.
        errors: The first few.
        known: Prompts that were asked before.
    """

    bench: Bench
    source: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    known: list[list[int]] = field(default_factory=list)

    @property
    def server(self) -> EngineServer:
        """Who is asked."""
        return self.bench[ELASTIC]

    async def client(self, session: httpx.AsyncClient, end: float) -> None:
        """Ask, read all of the answer or hang up, and ask again, until the time is up."""
        sizes = self.bench.sizes
        while time.monotonic() < end:
            if self.known and self.source.random() < KNOWN_PART:
                prompt = self.source.choice(self.known)
                self.counts["came_again"] += 1
            else:
                num_tokens = self.source.randrange(sizes.short_tokens // 8, sizes.short_tokens)
                prompt = self.bench.prompt(num_tokens)
                self.known = [*self.known[-MAX_KNOWN:], prompt]
            num_out = self.source.randrange(8, 128)
            stays = self.source.random() >= ABORTED_PART
            read = num_out if stays else self.source.randrange(num_out)
            try:
                found = await ask(session, self.server.name, prompt, num_out, read)
            except (httpx.HTTPError, ValueError) as error:
                found = "failed"
                self.errors = [*self.errors, f"{type(error).__name__}: {error}"][:MAX_ERRORS]
            self.counts[found] += 1

    async def asks(self, ledger: Ledger, end: float) -> None:
        """Ask for a random part of the cache, now and then, as a neighbour does."""
        while time.monotonic() < end:
            await asyncio.sleep(ASK_EVERY_SECONDS)
            (view,) = ledger.view().instances
            num_bytes = int(self.source.random() * view.cached_bytes)
            if num_bytes >= view.page_bytes and ledger.ask(view.row, num_bytes):
                bell.wake(ledger, [view.row])
                self.counts["asks"] += 1

    async def look(self, record: Record, end: float) -> None:
        """Write down what there is by now: a run may be cut off."""
        started = time.monotonic()
        while time.monotonic() < end:
            await asyncio.sleep(min(LOOK_SECONDS, max(end - time.monotonic(), 0.1)))
            record.add(soak=self.figures(time.monotonic() - started))
            print(f"soak: {record.results['soak']}", flush=True)

    async def run(self, record: Record, *, seconds: float, num_clients: int) -> None:
        """Do all of it for so long."""
        end = time.monotonic() + seconds
        limits = httpx.Limits(max_connections=num_clients)
        with self.bench.servers.open_ledger() as ledger:
            async with httpx.AsyncClient(
                base_url=self.server.url, timeout=120.0, limits=limits
            ) as session:
                clients = (self.client(session, end) for _ in range(num_clients))
                await asyncio.gather(*clients, self.asks(ledger, end), self.look(record, end))

    def figures(self, seconds: float) -> dict[str, Any]:
        """Return what became of it so far."""
        view = self.bench.servers.view(ELASTIC)
        stored, loaded = (self.bench.copied(self.server, word)[0] for word in ("store", "load"))
        return {
            "seconds": seconds,
            **self.counts,
            "errors": self.errors,
            "stored_bytes": stored,
            "loaded_bytes": loaded,
            "unmapped_bytes": view.num_unmapped_bytes,
            "preemptions": self.server.metric(PREEMPTIONS),
        }


def wrong_lines(server: EngineServer) -> list[str]:
    """Return the lines of a server's log that say that something broke."""
    lines = server.log.read_text(errors="replace").splitlines()
    return [line for line in lines if WRONG.search(line)][:20]


def soak(bench: Bench, record: Record, options: argparse.Namespace) -> list[str]:
    """Run it; return what is wrong."""
    server = bench[ELASTIC]
    prompts = [bench.prompt(bench.sizes.short_tokens // 2) for _ in range(NUM_CHECKED)]
    first = [bench.answer(server, prompt, CHECKED_TOKENS) for prompt in prompts]
    running = Soak(bench, random.Random(options.seed))
    died = ""
    try:
        asyncio.run(running.run(record, seconds=options.seconds, num_clients=options.num_clients))
        last = [bench.answer(server, prompt, CHECKED_TOKENS) for prompt in prompts]
    except (httpx.HTTPError, KeyError, ValueError) as error:
        died, last = f"{type(error).__name__}: {error}", []
    lines = wrong_lines(server)
    num_equal = sum(a == b for a, b in zip(first, last, strict=False))
    record.add(wrong_lines=lines, num_equal=num_equal, num_checked=NUM_CHECKED, died=died)
    return [
        *([f"it died: {died}"] if died or server.process.poll() is not None else []),
        *(f"its log: {line}" for line in lines),
        *([f"{running.counts['failed']} failed: {running.errors}"] if running.errors else []),
        *([] if died or num_equal == NUM_CHECKED else [f"{num_equal} answers as at first"]),
        *(f"nothing was {word}" for word in ("answered", "aborted", "asks")
          if not running.counts[word]),
    ]  # fmt: skip


def main() -> None:
    """Measure, print, write JSON."""
    arguments = parser(__doc__)
    arguments.add_argument("--seconds", type=float, default=1800.0)
    arguments.add_argument("--num-clients", type=int, help=f"{NUM_CLIENTS}, or {TINY_CLIENTS}")
    arguments.add_argument("--seed", type=int, default=1)
    arguments.add_argument("--tier-gib", type=int, default=16)
    arguments.add_argument("--kv-gib", type=int, default=12)
    arguments.add_argument("--server-options", default="", help="words for the server")
    options = arguments.parse_args()
    options.server_options = shlex.split(options.server_options)
    options.num_clients = options.num_clients or (TINY_CLIENTS if options.tiny else NUM_CLIENTS)
    options.ranks = options.rounds = 1
    options.num_prompts, options.disk, options.long_tokens = 0, None, 8_000
    with bench_run(options) as (setting, record):
        record.add(seed=options.seed, num_clients=options.num_clients)
        bench = Bench(setting, record, Sizes(options))
        bench.start([ELASTIC])
        found = soak(bench, record, options)
        record.add(wrong=found)
    print("\n".join(found) or "all well", flush=True)
    with contextlib.suppress(KeyError):
        print({name: record.results[name] for name in ("soak", "num_equal")}, flush=True)
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
