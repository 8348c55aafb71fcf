"""The client of `offload.py`: requests of one length, all at once or at random moments.

Both engines are asked by the same one, which needs nothing that an engine installs.
"""

import asyncio
import itertools
import random
from typing import Any

import numpy as np
from multi_model.client import Dialect, Target, replay
from multi_model.metrics import duration_seconds, tpots, ttfts
from multi_model.workloads import Request, Workload

from kvcached_demo.harness.server import EngineServer

AT_ONCE = "inf"


def schedule(num_in: int, num_out: int, rate: str, num: int, seed: int) -> Workload:
    """Return a schedule of requests.

    Args:
        num_in: Tokens of each prompt.
        num_out: Tokens of each answer.
        rate: Requests per second, which come at random moments, or `AT_ONCE`.
        num: How many.
        seed: Of the moments.
    """
    source = random.Random(seed)
    gaps = (0.0 if rate == AT_ONCE else source.expovariate(float(rate)) for _ in range(num))
    moments = itertools.accumulate(gaps)
    requests = tuple(Request(moment, 0, num_in, num_out) for moment in moments)
    return Workload(f"{num_in}/{num_out} at {rate}", 1, requests)


def bench(
    server: EngineServer, dialect: Dialect, workload: Workload, *, seed: int
) -> dict[str, Any]:
    """Ask a server and return the figures of it, by the names of `vllm_servers.FIGURES`."""
    target = Target(server.url, server.name, dialect)
    records = asyncio.run(replay(workload, [target], seed=seed))
    done = [record for record in records if not record.error]
    if not done:
        raise RuntimeError(f"{server.name} answered no request: {records[0].error}")
    seconds = duration_seconds(done)
    figures = {
        "output_throughput": sum(record.num_tokens for record in done) / seconds,
        "completed": len(done),
        "failed": len(records) - len(done),
        "duration": seconds,
    }
    for name, found in (("ttft", ttfts(done)), ("tpot", tpots(done))):
        values = np.asarray(found) * 1e3
        figures[f"mean_{name}_ms"] = float(values.mean())
        figures[f"p99_{name}_ms"] = float(np.percentile(values, 99))
    return figures
