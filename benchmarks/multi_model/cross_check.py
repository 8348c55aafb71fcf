"""Our client against vLLM's own, on one server under one steady load."""

import asyncio
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from multi_model import workloads as schedules
from multi_model.client import Record, replay
from multi_model.fleet import Fleet
from multi_model.metrics import spread, tpots, ttfts
from multi_model.settings import Lengths
from multi_model.workloads import Workload
from parts.vllm_servers import bench_serve
from tokenizers import Tokenizer

NUM_ROUNDS = 2


def cross_check(
    fleet: Fleet, model: Path, lengths: Lengths, rates: Sequence[float]
) -> list[dict[str, Any]]:
    """Return what both clients find at each rate: text prompts, sent at even distances.

    Args:
        fleet: One server.
        model: Its model's folder.
        lengths: How long requests are, and for how long they come.
        rates: Requests a second.
    """
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    found = []
    for rate in rates:
        steady = schedules.constant(
            rate,
            lengths.cross_check_seconds,
            num_models=1,
            num_in=lengths.num_in,
            num_out=lengths.num_out,
        )

        def ours(seed: int, steady: Workload = steady) -> list[Record]:
            return asyncio.run(replay(steady, fleet.targets, seed=seed, encode=tokenizer.decode))

        def theirs(seed: int, rate: float = rate, num: int = len(steady.requests)) -> Any:
            sizes = (lengths.num_in, lengths.num_out, str(rate), num, seed)
            return bench_serve(fleet.servers[0], model, *sizes, is_even=True)

        ours(NUM_ROUNDS)  # the first requests are slow
        found.append(means(rate, [(ours(seed), theirs(seed)) for seed in range(NUM_ROUNDS)]))
    return found


def means(rate: float, pairs: Sequence[tuple[list[Record], dict[str, Any]]]) -> dict[str, Any]:
    """Return what our client and vLLM's found at one rate, in ms."""
    ours = [record for records, _ in pairs for record in records]
    return {
        "rate": rate,
        "ours": {
            "mean_ttft_ms": spread(ttfts(ours))["mean"],
            "mean_tpot_ms": spread(tpots(ours))["mean"],
        },
        "vllm_bench_serve": {
            name: statistics.mean(theirs[name] for _, theirs in pairs)
            for name in ("mean_ttft_ms", "mean_tpot_ms")
        },
    }
