"""Throughput of vLLM's CPU engine with us against without, the two in turn in one run.

Two processes hold one engine each, vanilla and elastic, with the same model and the same nominal
size. The parent lets them work in turn on the same requests, and both are bound to the same core:
two cores of a shared host may differ by more than what is measured here.
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

from machine import describe_machine

POOL_BYTES = 512 << 20
# Requests, prompt and output tokens, prefix caching.
CASES = ((64, 128, 64, False), (48, 512, 32, False), (48, 512, 32, True))


def serve_turns(model: str, options: dict[str, Any]) -> None:
    """Answer each line on standard input with the wall and CPU seconds that one batch took."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    from vllm import LLM, SamplingParams

    elastic = os.environ["ENABLE_KVCACHED"] != "0"
    llm = LLM(
        model,
        enforce_eager=True,
        dtype="float32",
        max_model_len=2048,
        block_size=32,
        max_num_seqs=32,
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
            for _ in range(options["requests"])
        ]
        start = time.perf_counter(), time.process_time()
        llm.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - start[0], time.process_time() - start[1]
        print("turn", *seconds, flush=True)


class Engine:
    """One of the two engine processes."""

    def __init__(
        self, model: Path, folder: Path, options: dict[str, Any], *, elastic: bool
    ) -> None:
        environ = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "OMP_NUM_THREADS": "1",
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

    def turn(self, seed: int) -> list[float]:
        """Return the wall and the CPU seconds of one batch."""
        assert self.process.stdin is not None  # noqa: S101  opened above
        self.process.stdin.write(f"{seed}\n")
        self.process.stdin.flush()
        return self.read()

    def stop(self) -> None:
        """End the engine."""
        self.process.communicate()


def measure(options: dict[str, Any], pairs: int) -> dict[str, Any]:
    """Return the tokens per second of both, pair by pair, and the median of their ratios."""
    from kvcached_core.cli.demo.model import make_model

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_model(folder / "model", seed=1)
        engines = {
            label: Engine(model, folder, options, elastic=label == "kvcached")
            for label in ("vanilla", "kvcached")
        }
        for engine in engines.values():
            engine.read()
            engine.turn(0)
        turns: dict[str, list[list[float]]] = {label: [] for label in engines}
        for pair in range(pairs):
            for label in sorted(engines, reverse=bool(pair % 2)):
                turns[label].append(engines[label].turn(pair + 1))
        for engine in engines.values():
            engine.stop()
    tokens = options["requests"] * (options["prompt"] + options["output"])
    result: dict[str, Any] = {**options, "pairs": pairs}
    for index, kind in enumerate(("wall", "cpu")):
        rates = {label: [tokens / turn[index] for turn in of] for label, of in turns.items()}
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
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--json", help="write the results to this file")
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
        for kind in ("wall", "cpu"):
            rates = result[kind]["tokens_per_second"]
            medians = {label: statistics.median(of) for label, of in rates.items()}
            low, high = result[kind]["ratio_quartiles"]
            print(
                f"  per second of {kind:4}  vanilla {medians['vanilla']:5.0f} tok  "
                f"kvcached {medians['kvcached']:5.0f} tok  "
                f"median ratio {result[kind]['ratio_median']:.3f} ({low:.3f} to {high:.3f})",
                flush=True,
            )
    if arguments.json:
        report = {"machine": describe_machine(), "results": results}
        Path(arguments.json).write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
