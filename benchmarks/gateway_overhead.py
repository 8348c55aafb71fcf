"""What the gateway adds to a request, beside none and beside LiteLLM's proxy.

    python benchmarks/gateway_overhead.py --json benchmarks/results/gateway_overhead.json
    python benchmarks/gateway_overhead.py --json FILE --litellm-python /path/to/venv/bin/python
    python benchmarks/gateway_overhead.py --json FILE --workers 4      # on 16 cores and more

A stand-in streams as fast as it is asked to; it is asked directly, through the gateway and through
LiteLLM's proxy, in turn, in one run. LiteLLM comes from an environment of its own, made with
`pip install 'litellm[proxy]'`; without one it is not measured. With `--workers` one
process and so many are compared under a load that neither shall bear, and nothing else is measured.
A stream has an event each millisecond at most: `--loads` times `--at-once` of them can be sent.
"""

import contextlib
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import uvloop
from parts import gateway_house
from parts.gateway_house import Server
from parts.gateway_load import Taken, ask_many, request
from parts.intervals import NUM_FOR_P99
from parts.machine import describe_machine
from parts.ordered import value_at
from parts.record import command_line, write

ROUNDS = 5
LONG_PROMPT_BYTES = 400_000
AT_ONCE = 8
NUM_STREAMS = 96
SLOW_US, FAST_US = 20_000, 4_800  # 96 streams: 4,800 and 20,000 events a second
NAMES = ("standin", *(f"every-{every}-us" for every in (SLOW_US, FAST_US)))
NUM_LOADS, LOADS_AT_ONCE = 4, 64  # of several workers
EVENT_US = 1000  # how far the events are apart that several workers pass on


@dataclass(frozen=True)
class Counts:
    """How many requests each way gets in each round; a 99th percentile needs the first of them."""

    alone: int = NUM_FOR_P99
    long: int = 40
    at_once: int = 1_500
    events: int = 100


COUNTS = Counts()


def load(server: Server, data: bytes, *, num: int, at_once: int) -> tuple[list[Taken], float]:
    """Send requests; return what each took, and the server's seconds of the processor."""
    before = server.cpu_seconds()
    taken = uvloop.run(ask_many(server.port, data, num=num, at_once=at_once))
    return taken, server.cpu_seconds() - before


def measure(server: Server, counts: Counts) -> dict[str, float]:
    """Return one round's figures of one way."""
    found: dict[str, float] = {}
    alone, _ = load(server, request("x"), num=counts.alone, at_once=1)
    ttfts = [taken.ttft_seconds * 1e3 for taken in alone]
    found |= {"ttft_p50_ms": value_at(50, ttfts), "ttft_p99_ms": value_at(99, ttfts)}
    long = request("x", prompt_bytes=LONG_PROMPT_BYTES)
    taken, cpu = load(server, long, num=counts.long, at_once=1)
    found["long_ttft_p50_ms"] = value_at(50, [one.ttft_seconds * 1e3 for one in taken])
    found["cpu_us_per_long_request"] = cpu / counts.long * 1e6
    begin = time.perf_counter()
    _, cpu = load(server, request("x"), num=counts.at_once, at_once=AT_ONCE)
    found["requests_per_second"] = counts.at_once / (time.perf_counter() - begin)
    found["cpu_us_per_request"] = cpu / counts.at_once * 1e6
    for name, every in (("slow", SLOW_US), ("fast", FAST_US)):
        data = request("x", num_tokens=counts.events, every_us=every)
        begin = time.perf_counter()
        taken, cpu = load(server, data, num=NUM_STREAMS, at_once=NUM_STREAMS)
        num = sum(one.num_events for one in taken)
        cpu -= NUM_STREAMS * found["cpu_us_per_request"] * 1e-6
        found[f"events_per_second_{name}"] = num / (time.perf_counter() - begin)
        found[f"cpu_us_per_event_{name}"] = cpu / num * 1e6
    return found


def summarise(rounds: Mapping[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Return what each way adds to the direct one, round by round, and ours beside LiteLLM's."""
    added: dict[str, dict[str, list[float]]] = {}
    for way in set(rounds) - {"direct"}:
        pairs = list(zip(rounds[way], rounds["direct"], strict=True))
        added[way] = {
            name: [ours[name] - direct[name] for ours, direct in pairs]
            for name in ("ttft_p50_ms", "ttft_p99_ms", "long_ttft_p50_ms")
        }
    if "litellm" in added:
        added["gateway_of_litellm"] = {
            name: [
                ours / theirs for ours, theirs in zip(values, added["litellm"][name], strict=True)
            ]
            for name, values in added["gateway"].items()
        }
    return added


def compare(litellm_python: Path | None, num_rounds: int) -> dict[str, Any]:
    """Measure all ways in turn."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ways = {"direct": stack.enter_context(gateway_house.standin())}
        url = f"http://127.0.0.1:{ways['direct'].port}"
        ways["gateway"] = stack.enter_context(gateway_house.gateway(dict.fromkeys(NAMES, url)))
        release = "not measured"
        if litellm_python is not None:
            release = _litellm_release(litellm_python)
            ways["litellm"] = stack.enter_context(
                gateway_house.litellm(litellm_python, url, folder)
            )
        for server in ways.values():
            load(server, request("x"), num=50, at_once=AT_ONCE)
        rounds: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        for _ in range(num_rounds):
            for way, server in ways.items():
                rounds[way].append(measure(server, COUNTS))
    return {"litellm": release, "rounds": rounds, "added": summarise(rounds)}


def _litellm_release(python: Path) -> str:
    script = "import importlib.metadata as m; print(m.version('litellm'))"
    return subprocess.run(
        [str(python), "-c", script], capture_output=True, text=True, check=True
    ).stdout.strip()


def _load_one(port: int, model: str, num: int, num_tokens: int, at_once: int) -> int:
    """Load a gateway from a process of its own; return how many events came."""
    data = request("x", num_tokens=num_tokens, model=model)
    taken = uvloop.run(ask_many(port, data, num=num, at_once=at_once))
    return sum(one.num_events for one in taken)


def compare_workers(
    num_workers: int, num_rounds: int, num_loads: int = NUM_LOADS, at_once: int = LOADS_AT_ONCE
) -> dict[str, Any]:
    """Compare one process with several, in turn, under as much load as they bear.

    Args:
        num_workers: Of the several.
        num_rounds: How often.
        num_loads: How many processes load them, each with a stand-in of its own.
        at_once: How many requests each of these has at a time.
    """
    rates: dict[str, dict[str, list[float]]] = {
        kind: {"1": [], str(num_workers): []} for kind in ("requests", "events")
    }
    with _standins(num_loads) as urls, ProcessPoolExecutor(num_loads, gateway_house.SPAWN) as pool:
        for _ in range(num_rounds):
            for workers in (1, num_workers):
                with gateway_house.gateway(urls, workers) as server:
                    for kind, num, num_tokens in (
                        ("requests", 5_000, 1),
                        ("events", 8 * at_once, 200),
                    ):
                        one = partial(
                            _load_one, server.port, num=num, num_tokens=num_tokens, at_once=at_once
                        )
                        list(pool.map(partial(one, num=at_once), urls))  # all are warm
                        begin = time.perf_counter()
                        events = sum(pool.map(one, urls))
                        seconds = time.perf_counter() - begin
                        total = num_loads * num if kind == "requests" else events
                        rates[kind][str(workers)].append(total / seconds)
    ratios = {
        kind: [many / one for one, many in zip(*found.values(), strict=True)]
        for kind, found in rates.items()
    }
    return {
        "num_workers": num_workers,
        "num_loads": num_loads,
        "at_once": at_once,
        "events_sent_at_most": num_loads * at_once * 1_000_000 // EVENT_US,
        "per_second": rates,
        "ratios": ratios,
    }


@contextlib.contextmanager
def _standins(num: int) -> Iterator[dict[str, str]]:
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(gateway_house.standin()) for _ in range(num)]
        yield {
            f"every-{EVENT_US + number}-us": f"http://127.0.0.1:{server.port}"
            for number, server in enumerate(servers)
        }


def _print(results: dict[str, Any]) -> None:
    for way, found in results.get("added", {}).items():
        for name, values in found.items():
            print(f"{way:20} {name:20} {_spread(values)}")
    for way, rounds in results.get("rounds", {}).items():
        for name in rounds[0]:
            print(f"{way:20} {name:26} {_spread([found[name] for found in rounds])}")
    for kind, values in results.get("ratios", {}).items():
        print(f"{results['num_workers']} workers to one, {kind}: {_spread(values)}")


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):10.3f} ({min(values):.3f} to {max(values):.3f})"


def main() -> None:
    """Measure, print a table, write JSON."""
    arguments = command_line(__doc__)
    arguments.add_argument("--litellm-python", type=Path, help="the Python that has litellm[proxy]")
    arguments.add_argument("--workers", type=int, help="compare so many processes with one")
    arguments.add_argument("--loads", type=int, default=NUM_LOADS, help="processes that load these")
    arguments.add_argument(
        "--at-once", type=int, default=LOADS_AT_ONCE, help="requests of each load"
    )
    arguments.add_argument("--rounds", type=int, default=ROUNDS)
    options = arguments.parse_args()
    cores = os.sched_getaffinity(0)
    results: dict[str, Any] = {"machine": describe_machine() | {"usable_cores": len(cores)}}
    if options.workers is None:
        results |= compare(options.litellm_python, options.rounds)
    else:
        results |= compare_workers(options.workers, options.rounds, options.loads, options.at_once)
    _print(results)
    write(options.json, results)


if __name__ == "__main__":
    main()
