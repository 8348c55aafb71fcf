"""One busy engine through `kvcached serve`, beside the same engine asked directly.

    python benchmarks/gateway_through.py --json benchmarks/results/gpu/gateway_through_h200.json
    python benchmarks/gateway_through.py --json FILE --tiny    # rehearse on vLLM's CPU engine

A gateway starts one server from a file of models. Each round asks it the same requests three times,
in turn: directly over its Unix socket, through the gateway, and directly once more: the control.
Throughput is its tokens over the seconds until the last answer has ended. TPOT is the mean over the
requests. What counts is the ratio to the direct requests of the same round.
"""

import argparse
import asyncio
import os
import statistics
import time
from collections.abc import Sequence
from typing import Any

import httpx
import uvloop
from parts.gateway_client import send
from parts.gateway_load import ask_many, post
from parts.gateway_schedule import Due, prompt
from parts.gateway_serve import Gateway
from parts.intervals import median_and_interval
from parts.record import Record, begin_record, command_line

from kvcached_core.units import MIB

PATH = "/v1/completions"
DIRECT, THROUGH, CONTROL = WAYS = ("direct", "through", "control")
FIGURES = ("tokens_per_second", "tpot_ms", "ttft_ms")
GENERATED = "vllm:generation_tokens_total"
TINY_KV_BYTES = 256 * MIB
COPY_SECONDS = 60.0
WRITE_SECONDS = 1.0  # an engine writes its counters down behind its answers


class Engine:
    """The engine of a gateway's only model.

    Attributes:
        socket: Where it listens.
        model: What the model is called.
    """

    def __init__(self, gateway: Gateway) -> None:
        (self.model,) = gateway.names
        (socket,) = (gateway.directory / "gateway" / "engines").glob("*.sock")
        self.socket = str(socket)

    def num_generated(self) -> int:
        """Return how many tokens it says that it has generated."""
        with httpx.Client(transport=httpx.HTTPTransport(uds=self.socket)) as client:
            text = client.get("http://localhost/metrics").raise_for_status().text
        lines = [line for line in text.splitlines() if line.startswith(GENERATED)]
        return int(sum(float(line.rsplit(" ", 1)[1]) for line in lines))


def start(gateway: Gateway, num_in: int, seconds: float) -> None:
    """Start the models by their first requests, and wait until their weights have copies.

    Raises:
        RuntimeError: If one does not answer in time.
    """
    first = [Due(0.0, name, prompt(1, num_in), 4) for name in gateway.names]

    async def ask() -> list[str]:
        answers = await asyncio.wait_for(send(gateway.url, first), seconds)
        return [answer.error for answer in answers if answer.error]

    if errors := asyncio.run(ask()):
        raise RuntimeError(f"a first request failed: {errors}")
    begin = time.monotonic()
    while not gateway.are_copied() and time.monotonic() - begin < COPY_SECONDS:
        time.sleep(0.1)


def measure(
    engine: Engine, at: int | str, data: bytes, options: argparse.Namespace
) -> dict[str, float]:
    """Send a batch one way; return its figures.

    Args:
        engine: Who generates.
        at: The gateway's port, or the engine's socket.
        data: The request.
        options: How many of them, how many at a time, and for how many tokens.

    Raises:
        RuntimeError: If the engine did not generate just what was asked for.
    """
    before = engine.num_generated()
    begin = time.perf_counter()
    taken = uvloop.run(ask_many(at, data, num=options.requests, at_once=options.at_once))
    seconds = time.perf_counter() - begin
    wanted = options.requests * options.tokens
    until = time.monotonic() + WRITE_SECONDS
    while (num := engine.num_generated() - before) < wanted and time.monotonic() < until:
        time.sleep(0.05)
    if num != wanted:
        raise RuntimeError(f"the engine generated {num} tokens, and {wanted} were asked for")
    tpots = [(one.seconds - one.ttft_seconds) / (options.tokens - 1) for one in taken]
    return {
        "tokens_per_second": wanted / seconds,
        "tpot_ms": statistics.fmean(tpots) * 1e3,
        "ttft_ms": statistics.fmean(one.ttft_seconds for one in taken) * 1e3,
        "events": float(sum(one.num_events for one in taken)),
    }


def summarise(
    rounds: Sequence[dict[str, dict[str, float]]], figures: Sequence[str] = FIGURES
) -> dict[str, Any]:
    """Return each round's ratios to the direct requests, and their medians with intervals."""
    ratios = {
        way: {
            figure: [each[way][figure] / each[DIRECT][figure] for each in rounds]
            for figure in figures
        }
        for way in (THROUGH, CONTROL)
    }
    intervals = {
        way: {figure: median_and_interval(values) for figure, values in found.items()}
        for way, found in ratios.items()
    }
    return {"ratios": ratios, "medians_and_intervals": intervals}


def in_turn(number: int) -> tuple[str, ...]:
    """Return the ways in a round's order: another one is first each time."""
    turn = number % len(WAYS)
    return WAYS[turn:] + WAYS[:turn]


def compare(gateway: Gateway, record: Record, options: argparse.Namespace) -> None:
    """Ask in turn, another way first each round; record what is known so far after each."""
    engine = Engine(gateway)
    body = {
        "model": engine.model,
        "prompt": list(prompt(2, options.prompt)),
        "max_tokens": options.tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
    }
    data = post(PATH, "localhost", body)
    at: dict[str, int | str] = dict.fromkeys(WAYS, engine.socket) | {THROUGH: gateway.port}
    for way in WAYS:
        measure(engine, at[way], data, options)  # the first are slow
    rounds: list[dict[str, dict[str, float]]] = []
    begin = time.monotonic()
    while len(rounds) < options.rounds and time.monotonic() - begin < options.seconds:
        order = in_turn(len(rounds))
        rounds.append({way: measure(engine, at[way], data, options) for way in order})
        record.add(rounds=rounds, **summarise(rounds))


def table(results: dict[str, Any]) -> str:
    """Return the figures as text, with the bars."""
    lines = [f"{len(results['rounds'])} rounds, bars: throughput 0.99, TPOT 1.01"]
    for way, found in results["medians_and_intervals"].items():
        for figure, (middle, low, high) in found.items():
            direct = statistics.median(each[DIRECT][figure] for each in results["rounds"])
            lines.append(
                f"{way:8} {figure:18} {middle:.4f} ({low:.4f} to {high:.4f}), direct {direct:.2f}"
            )
    return "\n".join(lines)


def main() -> None:
    """Measure, print a table, write JSON."""
    arguments = command_line(__doc__, can_rehearse=True)
    arguments.add_argument("--eager", action="store_true", help="a GPU's server starts sooner")
    arguments.add_argument("--rounds", type=int, default=12)
    arguments.add_argument("--seconds", type=float, default=3600.0, help="no round begins later")
    arguments.add_argument("--requests", type=int, help="of a batch")
    arguments.add_argument("--at-once", type=int, help="of them")
    arguments.add_argument("--prompt", type=int, default=256, help="tokens of a prompt")
    arguments.add_argument("--tokens", type=int, default=128, help="tokens of an answer")
    arguments.add_argument("--start-seconds", type=float, default=600.0)
    options = arguments.parse_args()
    options.at_once = options.at_once or (16 if options.tiny else 64)
    options.requests = options.requests or 2 * options.at_once
    record = begin_record(options)
    record.add(
        load_before=os.getloadavg()[0],
        batch={
            name: getattr(options, name) for name in ("requests", "at_once", "prompt", "tokens")
        },
        is_eager=options.tiny or options.eager,
    )
    gateway = Gateway(
        1,
        cards=1,
        tiny=options.tiny,
        headroom_bytes=0,
        tiny_kv_bytes=TINY_KV_BYTES,
        is_eager=options.eager,
    )
    with gateway.recorded(options.json):
        begin = time.monotonic()
        start(gateway, options.prompt, options.start_seconds)
        record.add(start_seconds=time.monotonic() - begin)
        compare(gateway, record, options)
    record.add(load_after=os.getloadavg()[0])
    print(table(record.results))


if __name__ == "__main__":
    main()
