"""Throughput of vLLM's CPU engine with us against without, the two in turn in one run.

Two processes hold one engine each, vanilla and elastic, with the same model and the same nominal
size. Both are bound to one core and get the same requests at the same time: the kernel lets them
work in turn, a few milliseconds each, and what else happens to the machine happens to both. What
is compared are tokens per CPU second, the system's time for mapping included.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from parts.machine import describe_machine
from parts.record import write

POOL_BYTES = 512 << 20
# Requests behind the first wave, prompt and output tokens, prefix caching.
CASES = ((64, 128, 64, False), (32, 512, 32, False), (32, 512, 32, True))
WARM_REQUESTS = 24
KINDS = ("from idle", "steady")


def serve_turns(model: str, options: dict[str, Any]) -> None:
    """Answer each line on standard input with what one batch took."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    from vllm import LLM, SamplingParams

    elastic = os.environ["ENABLE_KVCACHED"] != "0"
    llm = LLM(
        model,
        enforce_eager=True,
        dtype="float32",
        max_model_len=2048,
        block_size=32,
        max_num_seqs=WARM_REQUESTS,
        enable_prefix_caching=options["caching"],
        **({} if elastic else {"kv_cache_memory_bytes": POOL_BYTES}),
    )
    sampling = SamplingParams(temperature=0, max_tokens=options["output"], ignore_eos=True)
    source = random.Random(1)
    print("ready", flush=True)
    for line in sys.stdin:
        source.seed(int(line))
        prompts = [
            {"prompt_token_ids": [source.randrange(3, 500) for _ in range(options["prompt"])]}
            for _ in range(WARM_REQUESTS + options["requests"])
        ]
        from_idle, steady = answer_all(llm.llm_engine, prompts, sampling)
        print("turn", from_idle, steady, mapping_seconds(llm) if elastic else 0, flush=True)


def answer_all(engine: Any, prompts: list[Any], sampling: Any) -> tuple[float, float]:
    """Return the CPU seconds of all requests, and of those after the first wave.

    While the first wave runs, an elastic engine takes the memory that it gave back when idle.
    """
    start = warm = time.process_time()
    for number, prompt in enumerate(prompts):
        engine.add_request(f"{start}-{number}", prompt, sampling)
    num_finished = 0
    while engine.has_unfinished_requests():
        was_warm = num_finished >= WARM_REQUESTS
        num_finished += sum(output.finished for output in engine.step())
        if not was_warm:
            warm = time.process_time()
    end = time.process_time()
    return end - start, end - warm


def mapping_seconds(llm: Any) -> float:
    """Return the seconds inside map since the last call: what giving memory back costs later."""
    core = llm.llm_engine.engine_core.engine_core
    memory = core.model_executor.driver_worker.worker.kvcached
    all_seconds = float(memory.arena.maps.times().seconds)
    before, memory.seconds_seen = getattr(memory, "seconds_seen", 0.0), all_seconds
    return all_seconds - before


class Engine:
    """One of the two engine processes."""

    def __init__(
        self, model: Path, folder: Path, options: dict[str, Any], *, elastic: bool
    ) -> None:
        from kvcached_demo.harness.engines import VLLM
        from kvcached_demo.harness.server import ENGINE_ENVIRON

        environ = {
            **os.environ,
            **ENGINE_ENVIRON,
            **VLLM.host_environ,
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_CPU_OMP_THREADS_BIND": str(max(os.sched_getaffinity(0))),
            "ENABLE_KVCACHED": str(int(elastic)),
            "KVCACHED_DIR": str(folder / "kv"),
            "KVCACHED_HOST_POOL": str(POOL_BYTES),
        }
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", str(model), json.dumps(options)],
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def read(self) -> list[float]:
        """Return the numbers of the next line that the engine's process meant for us."""
        assert self.process.stdout is not None  # noqa: S101  opened above
        for line in self.process.stdout:
            word, *numbers = line.split() or [""]
            if word in ("ready", "turn"):
                return [float(number) for number in numbers]
        raise SystemExit("an engine ended before its turn")

    def begin_turn(self, seed: int) -> None:
        """Send the engine to work; `read` then returns what it took."""
        assert self.process.stdin is not None  # noqa: S101  opened above
        self.process.stdin.write(f"{seed}\n")
        self.process.stdin.flush()

    def stop(self) -> None:
        """End the engine."""
        self.process.communicate()


def measure(options: dict[str, Any], pairs: int) -> dict[str, Any]:
    """Return the tokens per second of both, pair by pair, and the median of their ratios."""
    from kvcached_demo.harness.model import make_model

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_model(folder / "model", seed=1)
        engines = {
            label: Engine(model, folder, options, elastic=label == "kvcached")
            for label in ("vanilla", "kvcached")
        }
        for engine in engines.values():
            engine.read()
        turns: dict[str, list[list[float]]] = {label: [] for label in engines}
        for pair in range(-1, pairs):  # the first one warms up
            for label in sorted(engines, reverse=bool(pair % 2)):
                engines[label].begin_turn(pair + 1)
            for label, engine in engines.items():
                numbers = engine.read()
                if pair >= 0:
                    turns[label].append(numbers)
        for engine in engines.values():
            engine.stop()
    per_request = options["prompt"] + options["output"]
    mapping = [turn[2] / turn[0] for turn in turns["kvcached"]]
    result: dict[str, Any] = {
        **options,
        "warm_requests": WARM_REQUESTS,
        "pairs": pairs,
        "mapping_share_of_all_median": statistics.median(mapping),
    }
    for index, kind in enumerate(KINDS):
        requests = options["requests"] + (WARM_REQUESTS if kind == "from idle" else 0)
        rates = {
            label: [requests * per_request / turn[index] for turn in of]
            for label, of in turns.items()
        }
        ratios = [
            ours / vanilla
            for ours, vanilla in zip(rates["kvcached"], rates["vanilla"], strict=True)
        ]
        result[kind] = {
            "tokens_per_second": rates,
            "ratios": ratios,
            "ratio_median": statistics.median(ratios),
            "ratio_quartiles": statistics.quantiles(ratios, n=4)[::2],
        }
    return result


def main() -> None:
    """Measure three mixes and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    arguments = parser.parse_args()
    if arguments.serve:
        serve_turns(arguments.serve[0], json.loads(arguments.serve[1]))
        return
    results = []
    for requests, prompt, output, caching in CASES:
        options = {"requests": requests, "prompt": prompt, "output": output, "caching": caching}
        result = measure(options, arguments.pairs)
        results.append(result)
        print(f"{prompt} in, {output} out, prefix caching {'on' if caching else 'off'}")
        for kind in KINDS:
            rates = result[kind]["tokens_per_second"]
            medians = {label: statistics.median(of) for label, of in rates.items()}
            low, high = result[kind]["ratio_quartiles"]
            print(
                f"  {kind:9}  vanilla {medians['vanilla']:5.0f} tok  "
                f"kvcached {medians['kvcached']:5.0f} tok  "
                f"median ratio {result[kind]['ratio_median']:.3f} ({low:.3f} to {high:.3f})",
                flush=True,
            )
        print(f"  mapping pages: {result['mapping_share_of_all_median']:.1%} of all CPU time")
    if arguments.json:
        report = {"machine": describe_machine(), "results": results}
        write(arguments.json, report)


if __name__ == "__main__":
    main()
