"""Our client and vLLM's against a server that only keeps time: which one adds how much?

    python benchmarks/clients.py --json benchmarks/results/clients.json

The server answers like an engine: a new request waits for the next step, and every step brings a
token to every stream. It knows when each first token left, so what a client says on top is the
client's own.
"""

import asyncio
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from aiohttp import web
from multi_model import workloads
from multi_model.client import Target, replay
from multi_model.metrics import ttfts
from parts.machine import describe_machine
from parts.record import command_line, write
from parts.vllm_servers import bench_serve

from kvcached_demo.harness.model import make_model
from kvcached_demo.harness.server import free_port

NAME = "m0"
NUM_IN, NUM_OUT = 256, 256
STEP_SECONDS = 0.0075
RATES = (4, 12)
SECONDS = 10.0
PAIRS = 3


class Address(NamedTuple):
    """Where the server is and what its model is called, as `bench_serve` wants it."""

    url: str
    name: str = NAME


class Clockwork:
    """An engine without a model: steps of a fixed length, a token for every stream in each."""

    def __init__(self) -> None:
        self.ttft_seconds: list[float] = []
        self._step = asyncio.Condition()

    async def run(self, _app: web.Application) -> AsyncIterator[None]:
        """Step until the application ends."""
        task = asyncio.create_task(self._tick())
        yield
        task.cancel()

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """Stream a completion."""
        begin = time.perf_counter()
        num_tokens = (await request.json())["max_tokens"]
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for number in range(num_tokens):
            async with self._step:
                await self._step.wait()
            if not number:
                self.ttft_seconds.append(time.perf_counter() - begin)
            await response.write(_event(choices=[{"text": "w3", "index": 0}]))
        await response.write(_event(choices=[], usage={"completion_tokens": num_tokens}))
        await response.write(b"data: [DONE]\n\n")
        return response

    async def take(self, _request: web.Request) -> web.Response:
        """Return the times to the first token since the last call."""
        taken, self.ttft_seconds = self.ttft_seconds, []
        return web.json_response(taken)

    async def _tick(self) -> None:
        due = time.perf_counter()
        while True:
            due += STEP_SECONDS
            await asyncio.sleep(due - time.perf_counter())
            async with self._step:
                self._step.notify_all()


def _event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def serve(port: int) -> None:
    """Be the server."""
    clockwork = Clockwork()
    app = web.Application()
    app.cleanup_ctx.append(clockwork.run)
    app.router.add_post("/v1/completions", clockwork.complete)
    app.router.add_get("/ttfts", clockwork.take)
    web.run_app(app, host="127.0.0.1", port=port, print=None)


def compare(url: str, model: Path, rate: int) -> dict[str, Any]:
    """Return what each client adds to the server's own mean time to the first token, in ms."""
    steady = workloads.constant(rate, SECONDS, num_models=1, num_in=NUM_IN, num_out=NUM_OUT)
    num = len(steady.requests)
    added: dict[str, list[float]] = {"ours": [], "vllm_bench_serve": []}

    def truth() -> float:
        return statistics.mean(httpx.get(f"{url}/ttfts").json()[-num:]) * 1e3

    for seed in range(PAIRS):
        records = asyncio.run(replay(steady, [Target(url, NAME)], seed=seed))
        added["ours"].append(statistics.mean(ttfts(records)) * 1e3 - truth())
        theirs = bench_serve(
            Address(url), model, NUM_IN, NUM_OUT, str(rate), num, seed, is_even=True
        )
        added["vllm_bench_serve"].append(theirs["mean_ttft_ms"] - truth())
    medians = {name: float(statistics.median(values)) for name, values in added.items()}
    return medians | {"rounds": added}


def main() -> None:
    """Measure, print a table, write JSON."""
    arguments = command_line(__doc__)
    path = arguments.parse_args().json
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    port = free_port()
    child = multiprocessing.get_context("spawn").Process(target=serve, args=(port,), daemon=True)
    child.start()
    results: dict[str, Any] = {"machine": describe_machine()}
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder), seed=1)
        for rate in RATES:
            results[f"{rate}/s"] = compare(f"http://127.0.0.1:{port}", model, rate)
            print(f"{rate}/s: mean TTFT beyond the server's, ms: {results[f'{rate}/s']}")
    child.terminate()
    write(path, results)


if __name__ == "__main__":
    main()
