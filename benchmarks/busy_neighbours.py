"""Two models that compute at the same time on one GPU: how much does each slow the other?

    python benchmarks/busy_neighbours.py --json benchmarks/results/gpu/busy_neighbours_h200.json
    python benchmarks/busy_neighbours.py --json FILE --ways plain mps mps:60

Two elastic vLLM servers of each shape run side by side. In each round the same clients keep one of
them busy, then two at once, then the first one alone again: the control. What counts is the tokens
a second of one alone, divided by its tokens a second beside the other, in the same round. `mps`
does the same with the servers as clients of NVIDIA's MPS daemon, which this user starts and ends;
`mps:60` gives each client 60 % of the multiprocessors. Where the daemon may not be started, or an
engine does not start as its client, the record says so. `--tiny` rehearses on vLLM's CPU engine.
"""

import argparse
import asyncio
import contextlib
import functools
import itertools
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from parts import mps
from parts.intervals import median_and_interval
from parts.record import Record, begin_record, command_line
from parts.vllm_servers import READY_SECONDS, SHORT_FOLDER

from kvcached_core.units import MIB
from kvcached_demo.harness.engines import VLLM
from kvcached_demo.harness.load import make_burst
from kvcached_demo.harness.model import make_model
from kvcached_demo.harness.server import EngineServer, ServerError
from kvcached_demo.harness.servers import Servers

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers.shapes import make_shape

PLAIN, MPS = "plain", "mps"
TINY = "tiny"
SHAPES = ("llama-8b", "llama-1b")
NUM_IN, NUM_OUT, MAX_TOKENS = 256, 128, 2048
TINY_POOL_BYTES = 512 * MIB
GENERATED = "vllm:generation_tokens_total"
Times = dict[str, list[float]]
# Until as many requests of a load run as its clients may have.
WARM_SECONDS = 1.0


@dataclass(frozen=True)
class Load:
    """Servers that are kept busy at the same time.

    Attributes:
        name: What the record calls it.
        names: The servers.
    """

    name: str
    names: tuple[str, ...]


def loads(shapes: Sequence[str]) -> list[Load]:
    """Return what a round consists of: each shape alone, beside its like, alone; then mixed."""
    found = []
    for shape in shapes:
        first, second = f"{shape}-0", f"{shape}-1"
        found += [
            Load(f"{shape} alone", (first,)),
            Load(f"{shape} beside {shape}", (first, second)),
            Load(f"{shape} alone again", (first,)),
        ]
    pairs = itertools.combinations(shapes, 2)
    return found + [Load(f"{a} beside {b}", (f"{a}-0", f"{b}-0")) for a, b in pairs]


async def keep_busy(server: EngineServer, num_clients: int, seed: int, num_out: int) -> None:
    """Send one request after the other from each client until cancelled."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=None, limits=limits) as http:  # noqa: S113  it is cancelled

        async def ask(client: int) -> None:
            for number in itertools.count():
                burst = make_burst(
                    num_requests=1,
                    num_prompt_tokens=NUM_IN,
                    num_output_tokens=num_out,
                    seed=(seed * num_clients + client) * 10_000 + number,
                )
                body = {"model": server.name, "prompt": list(burst.prompts[0])}
                body |= {"max_tokens": num_out, "ignore_eos": True, "temperature": 0.0}
                (await http.post("/v1/completions", json=body)).raise_for_status()

        async with asyncio.TaskGroup() as group:
            for client in range(num_clients):
                group.create_task(ask(client))


async def tokens_per_second(
    servers: Sequence[EngineServer], num_clients: int, seconds: float, num_out: int
) -> list[float]:
    """Keep servers busy together; return each one's tokens a second, by its own count."""
    busy = [
        asyncio.create_task(keep_busy(server, num_clients, seed, num_out))
        for seed, server in enumerate(servers)
    ]
    measured = asyncio.create_task(_counted(servers, seconds))
    try:
        done, _ = await asyncio.wait([measured, *busy], return_when=asyncio.FIRST_COMPLETED)
        for task in done - {measured}:
            task.result()  # raises what ended it
        return await measured
    finally:
        for task in (measured, *busy):
            task.cancel()
        await asyncio.gather(measured, *busy, return_exceptions=True)


async def _counted(servers: Sequence[EngineServer], seconds: float) -> list[float]:
    await asyncio.sleep(WARM_SECONDS)

    async def count(server: EngineServer) -> tuple[float, float]:
        return await asyncio.to_thread(server.metric, GENERATED), time.monotonic()

    before = await asyncio.gather(*map(count, servers))
    await asyncio.sleep(seconds)
    after = await asyncio.gather(*map(count, servers))
    return [
        (num - was) / (now - then) for (was, then), (num, now) in zip(before, after, strict=True)
    ]


class Pairs:
    """Two servers of each shape, and what became of their loads.

    Args:
        folder: Where models, logs and the ledger lie.
        options: The command line's.
    """

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self._options = options
        self.shapes = [TINY] if options.tiny else options.shapes
        self.servers = Servers(folder, TINY_POOL_BYTES if options.tiny else None)
        self._models = {
            shape: make_model(folder / shape, seed=1)
            if options.tiny
            else make_shape(folder / shape, shape)
            for shape in self.shapes
        }

    def start(self, more: Mapping[str, str]) -> None:
        """Start all servers.

        Raises:
            ServerError: If one does not start.
        """
        given = VLLM.host_options
        if not self._options.tiny:
            given = ("--load-format", "dummy", *VLLM.gpu_options(MAX_TOKENS))
            given += ("--enforce-eager",) if self._options.eager else ()
        for shape, number in itertools.product(self.shapes, range(2)):
            self.servers.start(
                VLLM,
                f"{shape}-{number}",
                self._models[shape],
                *VLLM.caching(is_on=False),
                options=given,
                environ={"VLLM_LOGGING_LEVEL": "WARNING", "TMPDIR": SHORT_FOLDER, **more},
            )
        self.servers.wait_ready(seconds=READY_SECONDS)

    def round(self) -> dict[str, list[float]]:
        """Play each load once; return the tokens a second of its servers."""
        options = self._options
        words = (options.clients, options.seconds, options.num_out)
        return {
            load.name: asyncio.run(
                tokens_per_second([self.servers[name] for name in load.names], *words)
            )
            for load in loads(self.shapes)
        }


def slower(rounds: Sequence[Mapping[str, list[float]]], shapes: Sequence[str]) -> Times:
    """Return how many times slower each model is than alone in its round: median and interval.

    `SHAPE beside OTHER` is the shape's own loss. `SHAPE alone again` is the control.
    """
    found: Times = {}
    for load in loads(shapes):
        for place, name in enumerate(load.names):
            shape = name.rpartition("-")[0]
            _, _, other = load.name.partition(" beside ")
            said = f"{other} beside {load.name.partition(' ')[0]}" if place else load.name
            alone = f"{shape} alone"
            if said == alone or said in found:
                continue
            pairs = [(each[alone][0], each[load.name][place]) for each in rounds]
            if all(together for _, together in pairs):
                ratios = [by_itself / together for by_itself, together in pairs]
                found[said] = median_and_interval(ratios)
            else:  # no number says how much slower that is, and the other rounds do not either
                found[said] = []
    return found


@contextlib.contextmanager
def clients_of(way: str, *, tiny: bool) -> Iterator[tuple[dict[str, str], mps.Daemon | None]]:
    """Yield the variables of a way's servers, and the daemon where there is one.

    Raises:
        MpsError: If there is none to be had.
    """
    if way == PLAIN:
        yield {}, None
        return
    check = functools.partial(mps.probe, python=VLLM.python)
    with mps.running((lambda _environ: None) if tiny else check) as daemon:
        _, _, share = way.partition(":")
        yield daemon.environ | ({mps.SHARE: share} if share else {}), daemon


def play(way: str, options: argparse.Namespace, record: Record) -> None:
    """Play all rounds of one way, and record each; say why where it cannot be played."""
    facts: dict[str, Any] = {"rounds": []}
    with tempfile.TemporaryDirectory(prefix="kv-", ignore_cleanup_errors=True) as folder:
        try:
            with clients_of(way, tiny=options.tiny) as (environ, daemon):
                pairs = Pairs(Path(folder), options)
                with pairs.servers:
                    pairs.start(environ | dict(each.split("=", 1) for each in options.set))
                    if daemon is not None:
                        facts["num_clients"] = daemon.num_clients()
                    for _ in range(options.rounds):
                        facts["rounds"].append(pairs.round())
                        facts["times_slower"] = slower(facts["rounds"], pairs.shapes)
                        record.add(**{way: facts})
        except (mps.MpsError, ServerError, httpx.HTTPError, ExceptionGroup) as error:
            facts["failed"] = f"{type(error).__name__}: {error}"
            record.add(**{way: facts})
            print(f"{way}: {facts['failed']}", flush=True)
    for name, found in facts.get("times_slower", {}).items():
        said = "no token came in a round"
        if found:
            said = "{:.2f} times ({:.2f} to {:.2f})".format(*found)
        print(f"{way}: {name}: {said}", flush=True)


def is_way(words: str) -> str:
    """Return `plain`, `mps` or `mps:PERCENT` as it is.

    Raises:
        ArgumentTypeError: If it is another word.
    """
    name, _, share = words.partition(":")
    is_share = name == MPS and share.isdecimal() and 0 < int(share) <= 100  # noqa: PLR2004  per cent
    if words not in {PLAIN, MPS} and not is_share:
        raise argparse.ArgumentTypeError(f"{words!r} is not {PLAIN}, {MPS} or {MPS}:PERCENT")
    return words


def main() -> None:
    """Measure, print, write JSON."""
    arguments = command_line(__doc__, can_rehearse=True)
    arguments.add_argument("--ways", nargs="+", type=is_way, default=[PLAIN, MPS], metavar="WAY")
    arguments.add_argument("--shapes", nargs="+", default=SHAPES)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--seconds", type=float, default=3.0, help="of each load")
    arguments.add_argument("--clients", type=int, default=16, help="of each server")
    arguments.add_argument("--num-out", type=int, default=NUM_OUT, help="tokens of each answer")
    arguments.add_argument("--eager", action="store_true", help="no compilation: starts sooner")
    arguments.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help="of each server"
    )
    options = arguments.parse_args()
    record = begin_record(options)
    record.add(
        clients_of_each=options.clients,
        seconds=options.seconds,
        settings=list(options.set),
        is_eager=options.eager,
    )
    for way in options.ways:
        play(way, options, record)


if __name__ == "__main__":
    main()
