"""Two equally busy vLLM servers on one pool, beside two with half of it each.

    python benchmarks/equal_servers.py --json benchmarks/results/equal_servers.json

Sharing has nothing to gain here: both always want more than half. Four real servers of the tiny
model run on the host: two elastic ones that share a pool, and two vanilla ones with half of it
each. Those of one kind are idle while the others are asked. A round asks each kind for some
minutes, and the vanilla ones once more: the control. Clients send one request after the other,
prompts of mixed lengths of which some begin alike, and break some answers off. Counted are whole
answers, and how much of the prompts was found in the prefix cache, as the servers count it.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from parts.equal_asks import NUM_OUT, SIDES, Ask, asks
from parts.hanging_up import ANSWERED, ask
from parts.intervals import median_and_interval
from parts.machine import describe_machine
from parts.record import Record, command_line
from parts.vllm_servers import PREEMPTIONS, SHORT_FOLDER

from kvcached_core.units import MIB
from kvcached_demo.harness.engines import VLLM
from kvcached_demo.harness.model import KV_BYTES_PER_TOKEN, make_model
from kvcached_demo.harness.servers import Servers

HALVES, SHARED = "halves", "shared"
# A round asks these in turn. Where the vanilla ones come first and last, what a machine gains or
# loses meanwhile is in both.
TURNS = (HALVES, SHARED, HALVES)
WARM_SECONDS = 10.0
METRICS = {
    "asked_tokens": "vllm:prefix_cache_queries_total",
    "found_tokens": "vllm:prefix_cache_hits_total",
    "preemptions": PREEMPTIONS,
}
RATIOS = ("ratio", "control_ratio")
BAR = 0.98


class Clients:
    """Clients of the servers of a kind, which go on where they were when they are called again.

    Args:
        servers: All servers.
        kind: Whose clients these are.
        num_clients: Of each server.
    """

    def __init__(self, servers: Servers, kind: str, num_clients: int) -> None:
        self._servers = {side: servers[f"{kind}-{side}"] for side in SIDES}
        self._asks = {
            (side, client): asks(side, client) for side in SIDES for client in range(num_clients)
        }

    def run(self, seconds: float) -> dict[str, Any]:
        """Ask for some time; return what became of the requests, of both servers together."""
        before = self._metrics()
        counts = asyncio.run(self._run(seconds))
        found = {name: value - before[name] for name, value in self._metrics().items()}
        return {
            "answers": sum(counts[side, ANSWERED] for side in SIDES),
            "answers_of_each": [counts[side, ANSWERED] for side in SIDES],
            "all": {f"{side} {what}": number for (side, what), number in counts.items()},
            "hit_rate": found["found_tokens"] / max(found["asked_tokens"], 1),
            **found,
        }

    async def _run(self, seconds: float) -> Counter[tuple[str, str]]:
        counts: Counter[tuple[str, str]] = Counter()
        end = time.monotonic() + seconds
        async with asyncio.TaskGroup() as group:
            for (side, _), mine in self._asks.items():
                group.create_task(self._ask(side, mine, end, counts))
        return counts

    async def _ask(
        self, side: str, mine: Iterator[Ask], end: float, counts: Counter[tuple[str, str]]
    ) -> None:
        server = self._servers[side]
        async with httpx.AsyncClient(base_url=server.url, timeout=None) as session:  # noqa: S113  a queue may be long
            for number, one in enumerate(mine):
                try:
                    what = await ask(session, server.name, one.prompt, NUM_OUT, one.num_wanted)
                except (httpx.HTTPError, ValueError) as error:
                    what = f"{type(error).__name__}: {error}"
                is_over = time.monotonic() >= end
                # A client's first one counts however late: so few seconds are too few for none.
                if number == 0 or not is_over:
                    counts[side, what] += 1
                if is_over:
                    return

    def _metrics(self) -> dict[str, float]:
        servers = self._servers.values()
        return {
            name: sum(server.metric(metric) for server in servers)
            for name, metric in METRICS.items()
        }


def start(servers: Servers, folder: Path, pool_bytes: int) -> None:
    """Start all four, and wait until they answer."""
    model = make_model(folder / "model", seed=1)
    environ = VLLM.host_environ | {"VLLM_LOGGING_LEVEL": "WARNING"}
    for kind in (HALVES, SHARED):
        is_elastic = kind == SHARED
        size = VLLM.size(
            pool_bytes // len(SIDES), KV_BYTES_PER_TOKEN, is_elastic=is_elastic, is_host=True
        )
        words = (*VLLM.caching(is_on=True), *VLLM.running(32), *size)
        for side in SIDES:
            servers.start(
                *(VLLM, f"{kind}-{side}", model, *words), is_elastic=is_elastic, environ=environ
            )
    servers.wait_ready()


def measure(servers: Servers, record: Record, options: argparse.Namespace) -> None:
    """Ask the kinds in turn, and record each round."""
    clients = {kind: Clients(servers, kind, options.clients) for kind in (HALVES, SHARED)}
    for each in clients.values():
        each.run(min(WARM_SECONDS, options.seconds))
    rounds: list[dict[str, Any]] = []
    for _ in range(options.rounds):
        turns = [clients[kind].run(options.seconds) for kind in TURNS]
        first, shared, control = turns
        halves = statistics.mean(one["answers"] for one in (first, control))
        rounds.append(
            {
                "turns": turns,
                "ratio": shared["answers"] / halves,
                "control_ratio": control["answers"] / first["answers"],
            }
        )
        record.add(
            rounds=rounds,
            **{name: median_and_interval([one[name] for one in rounds]) for name in RATIOS},
        )


def table(results: dict[str, Any]) -> str:
    """Return the figures as text."""
    lines = []
    for number, one in enumerate(results["rounds"], 1):
        for kind, found in zip(TURNS, one["turns"], strict=True):
            lines.append(
                f"{number} {kind:7} {found['answers']:5} answers {found['answers_of_each']}, "
                f"{found['hit_rate']:.1%} of the prompts found, "
                f"{found['preemptions']:.0f} preemptions"
            )
        lines.append(f"{number} ratio {one['ratio']:.3f}, control {one['control_ratio']:.3f}")
    for name in RATIOS:
        median, low, high = results[name]
        lines.append(f"{name} {median:.3f} ({low:.3f} to {high:.3f}), bar {BAR}")
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    arguments = command_line(__doc__)
    arguments.add_argument("--seconds", type=float, default=200.0, help="of each turn")
    arguments.add_argument("--rounds", type=int, default=1)
    arguments.add_argument("--clients", type=int, default=8, help="of each server")
    arguments.add_argument("--pool-mib", type=int, default=256)
    options = arguments.parse_args()
    pool_bytes = options.pool_mib * MIB
    record = Record(options.json)
    record.add(machine=describe_machine(), seconds=options.seconds, bar=BAR)
    record.add(clients_of_each=options.clients, pool_bytes=pool_bytes)
    with (
        tempfile.TemporaryDirectory(prefix="kv-", dir=SHORT_FOLDER) as folder,
        Servers(Path(folder), pool_bytes) as servers,
    ):
        start(servers, Path(folder), pool_bytes)
        measure(servers, record, options)
    print(table(record.results))


if __name__ == "__main__":
    main()
