"""What the scheduler's path costs: this checkout, an earlier one and vanilla vLLM, in turn.

Each has a process of its own, which measures one case when it is told to. A round is one
measurement of each; its ratios compare what was measured within seconds of each other. In CPU time.

    git worktree add --detach BEFORE 6122019
    python benchmarks/scheduler_path.py --before BEFORE --json out.json
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import block_pool
from parts.intervals import median_and_interval
from parts.machine import describe_machine
from parts.record import write

HERE = Path(__file__).resolve().parent
PACKAGES = ("", "integrations/vllm", "patches")
BLOCK_SIZE = 16
NUM_LIVE = 64
PROMPT_TOKENS = 512
NUM_TURNS = 200
VANILLA, BEFORE, AFTER = "vanilla", "before", "after"


def elastic_pool(*args: Any, **kwargs: Any) -> Any:
    """Return a block pool of the checkout that is imported, with an engine beside it."""
    from kvcached_vllm.block_pool import ElasticBlockPool

    ledger = block_pool.Unlimited()
    spares = {"min_spare_pages": 2, "max_spare_pages": 4}  # as on a GPU
    try:
        pool = ElasticBlockPool(block_pool.GEOMETRY, ledger, *args, options=spares, **kwargs)
    except TypeError:  # before there was one engine in the core
        pool = ElasticBlockPool(block_pool.GEOMETRY, ledger, *args, **spares, **kwargs)
        pool.engine = SimpleNamespace(is_waiting=False)
        return pool
    from kvcached_core.engine.engine import ElasticEngine
    from kvcached_vllm.port import VllmPort

    port = VllmPort(core=None)
    port.pool = pool
    pool.engine = ElasticEngine(SimpleNamespace(is_waiting=False, close=lambda: None), port)
    pool.engine.pools.append(pool.pages)
    pool.giving = pool.engine.giving
    return pool


def make_pool(name: str, *, caching: bool) -> Any:
    """Return vLLM's pool or ours."""
    from vllm.v1.core.block_pool import BlockPool

    num_blocks = block_pool.NUM_PAGES * block_pool.GEOMETRY.blocks_per_page
    kind = BlockPool if name == VANILLA else elastic_pool
    return kind(num_blocks, caching, BLOCK_SIZE)


class Scheduling:
    """vLLM's own manager of a KV cache, hooked as an engine hooks it, and the end of a schedule.

    Args:
        name: Whose block pool it stands on.
        caching: Whether there is a prefix cache.
    """

    def __init__(self, name: str, *, caching: bool) -> None:
        from vllm.v1.core import kv_cache_coordinator
        from vllm.v1.core.kv_cache_manager import KVCacheManager

        allocate, schedule = KVCacheManager.allocate_slots, lambda _scheduler: SimpleNamespace()
        vanilla = kv_cache_coordinator.BlockPool
        if name != VANILLA:
            kv_cache_coordinator.BlockPool = elastic_pool
        self.manager = make_manager(caching=caching)
        kv_cache_coordinator.BlockPool = vanilla
        if name != VANILLA:
            from kvcached_vllm import engine_hooks

            allocate = engine_hooks.kv_cache_manager_allocate_slots(allocate)
            schedule = engine_hooks.scheduler_schedule(schedule)
        self.allocate = MethodType(allocate, self.manager)
        self._schedule = schedule
        self._scheduler = SimpleNamespace(kv_cache_manager=self.manager)
        self._num_requests = 0
        self._hasher: Any = None

    def end(self) -> None:
        """End a schedule."""
        self._schedule(self._scheduler)

    def request(self, num_tokens: int) -> Any:
        """Return a new request with a prompt of its own."""
        from vllm import SamplingParams
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.request import Request

        if self._hasher is None:
            init_none_hash(sha256)
            self._hasher = get_request_block_hasher(BLOCK_SIZE, sha256)
        self._num_requests += 1
        first = self._num_requests * num_tokens
        prompt = list(range(first, first + num_tokens))
        return Request(
            str(self._num_requests),
            prompt,
            SamplingParams(max_tokens=1),
            None,
            block_hasher=self._hasher,
        )


def make_manager(*, caching: bool) -> Any:
    """Return a manager of a model with one group of layers."""
    import torch
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

    spec = FullAttentionSpec(
        block_size=BLOCK_SIZE, num_kv_heads=1, head_size=8, dtype=torch.float32
    )
    num_blocks = block_pool.NUM_PAGES * block_pool.GEOMETRY.blocks_per_page
    return KVCacheManager(
        KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer"], spec)]),
        max_model_len=num_blocks * BLOCK_SIZE,
        scheduler_block_size=BLOCK_SIZE,
        hash_block_size=BLOCK_SIZE,
        enable_caching=caching,
    )


def prefill_steps(scheduling: Scheduling) -> float:
    """Return seconds per step that lets one prompt in and then ends the request of another."""
    requests = [scheduling.request(PROMPT_TOKENS) for _ in range(NUM_TURNS)]
    start = block_pool.CLOCK()
    for request in requests:
        scheduling.allocate(request, PROMPT_TOKENS)
        scheduling.end()
        scheduling.manager.free(request)
    return (block_pool.CLOCK() - start) / NUM_TURNS


def decode_steps(scheduling: Scheduling) -> float:
    """Return seconds per step in which each of 64 requests computes a token."""
    live = [scheduling.request(PROMPT_TOKENS + index % BLOCK_SIZE) for index in range(NUM_LIVE)]
    for request in live:
        scheduling.allocate(request, request.num_tokens)
        request.num_computed_tokens = request.num_tokens
    start = block_pool.CLOCK()
    for _ in range(NUM_TURNS):
        for request in live:
            request.append_output_token_ids(7)
            scheduling.allocate(request, 1)
            request.num_computed_tokens += 1
        scheduling.end()
    seconds = block_pool.CLOCK() - start
    for request in live:
        scheduling.manager.free(request)
    return seconds / NUM_TURNS


def steps_that_change_nothing(scheduling: Scheduling) -> float:
    """Return seconds per end of a schedule that took and freed nothing, while a request runs."""
    request = scheduling.request(PROMPT_TOKENS)
    scheduling.allocate(request, PROMPT_TOKENS)
    scheduling.end()
    num_turns = 50 * NUM_TURNS
    start = block_pool.CLOCK()
    for _ in range(num_turns):
        scheduling.end()
    seconds = block_pool.CLOCK() - start
    scheduling.manager.free(request)
    return seconds / num_turns


STEPS: dict[str, Callable[[Scheduling], float]] = {
    "a schedule that changes nothing": steps_that_change_nothing,
    "a step with one prompt of 512 tokens": prefill_steps,
    "a step of 64 decoding requests": decode_steps,
}
SECONDS_UNIT = 1e6


def cases() -> list[tuple[str, bool]]:
    """Return each case, and whether there is a prefix cache."""
    names = [*block_pool.CASES, *STEPS]
    found = [(name, caching) for caching in (False, True) for name in names]
    return [*found, *((name, True) for name in block_pool.CACHING_CASES)]


def serve(name: str) -> None:
    """Measure the case that each line of the standard input names, and say the seconds."""
    pools = {caching: make_pool(name, caching=caching) for caching in (False, True)}
    schedulings = {caching: Scheduling(name, caching=caching) for caching in (False, True)}
    of_pools = block_pool.CASES | block_pool.CACHING_CASES
    print("ready", flush=True)
    for line in sys.stdin:
        case, caching, rounds = json.loads(line)
        if case in of_pools:
            print(of_pools[case](pools[caching], rounds), flush=True)
        else:
            print(STEPS[case](schedulings[caching]), flush=True)


class Served:
    """A process with one checkout's code.

    Args:
        name: What it measures.
        checkout: Where its code lies.
    """

    def __init__(self, name: str, checkout: Path) -> None:
        paths = os.pathsep.join(str(checkout / folder) for folder in PACKAGES)
        self._process: Any = subprocess.Popen(
            [sys.executable, __file__, "--serve", name],
            env=os.environ | {"PYTHONPATH": paths},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        while self._read() != "ready":  # vLLM says this and that when it is imported
            pass

    def measure(self, case: str, rounds: int, *, caching: bool) -> float:
        """Return the seconds of one measurement."""
        self._process.stdin.write(json.dumps([case, caching, rounds]) + "\n")
        self._process.stdin.flush()
        return float(self._read())

    def close(self) -> None:
        """End it."""
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> str:
        return str(self._process.stdout.readline()).strip()


def main() -> None:
    """Measure in turn, print the medians of the ratios, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--before", type=Path, help="a checkout of the earlier code")
    parser.add_argument("--case", default="", help="only cases with this in their names")
    parser.add_argument("--rounds", type=int, default=20000, help="calls of a measurement")
    parser.add_argument("--pairs", type=int, default=31, help="measurements of a case")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return
    checkouts = {VANILLA: HERE.parent, BEFORE: options.before.resolve(), AFTER: HERE.parent}
    served = {name: Served(name, checkout) for name, checkout in checkouts.items()}
    results = []
    for case, caching in cases():
        if options.case not in case:
            continue
        seconds: dict[str, list[float]] = {name: [] for name in served}
        for number in range(options.pairs + 1):
            for name, one in served.items():
                measured = one.measure(case, options.rounds, caching=caching)
                if number or case in block_pool.CACHING_CASES:  # the first one warms up
                    seconds[name].append(measured)
        ratios = {
            f"{over} beside {under}": [
                a / b for a, b in zip(seconds[over], seconds[under], strict=True)
            ]
            for over, under in ((AFTER, VANILLA), (BEFORE, VANILLA), (AFTER, BEFORE))
        }
        intervals = {name: median_and_interval(found) for name, found in ratios.items()}
        results.append(
            {"case": case, "caching": caching, "seconds": seconds}
            | {"ratios": ratios, "medians_and_intervals": intervals}
        )
        shown = "  ".join(
            f"{name} {middle:.2f} ({low:.2f} to {high:.2f})"
            for name, (middle, low, high) in intervals.items()
        )
        middle = statistics.median(seconds[AFTER]) * SECONDS_UNIT
        print(f"{case:44} caching={caching!s:5} {middle:8.2f} us  {shown}")
    for one in served.values():
        one.close()
    if options.json:
        report = {"machine": describe_machine(), "results": results}
        write(options.json, report)


if __name__ == "__main__":
    main()
