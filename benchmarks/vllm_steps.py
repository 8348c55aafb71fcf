"""What a step costs with us and without, and nothing else: one engine of each kind, in turn.

    python benchmarks/vllm_steps.py --json benchmarks/results/vllm_steps.json

Two engines without servers decode and prefill the same prompts, under one lock, so that they take
turns from one second to the next and a machine that changes its speed changes it for both.
"""

import fcntl
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from vllm_servers import Record, Setting, bench_run, parser

from kvcached_core.units import GIB, MIB

ORDER = ("vanilla", "elastic")
# CUDA graphs for decoding and no compilation, which takes a minute and is not what is compared.
GRAPHS = {
    "mode": 0,
    "cudagraph_mode": "FULL_DECODE_ONLY",
    "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64],
}
LOADS = {  # prompts, tokens in, tokens out
    "decode 8": (8, 100, 128),
    "decode 64": (64, 100, 128),
    "prefill": (32, 1000, 1),
}


def steps(setting: Setting, record: Record, num_pairs: int) -> None:
    """Compare an engine of each kind, in processes that take turns."""
    lock = setting.folder / "turn"
    lock.touch()
    children = {}
    for name in ORDER:
        environ = os.environ | setting.environ | {"ENABLE_KVCACHED": str(int(name == "elastic"))}
        environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        environ["KVCACHED_DIR"] = str(setting.folder / "kv")
        command = [sys.executable, __file__, "--json", str(setting.folder / name)]
        command += ["--pairs", str(num_pairs), "--model", str(setting.model), "--lock", str(lock)]
        command += ["--tiny"] if setting.tiny else []
        with (setting.folder / f"{name}.log").open("w") as log:
            children[name] = subprocess.Popen(command, env=environ, stdout=log, stderr=log)
    for child in children.values():
        child.wait()
    found = {name: json.loads((setting.folder / name).read_text()) for name in ORDER}
    is_same = found["vanilla"]["tokens"] == found["elastic"]["tokens"]
    record.add(is_same_text=is_same, calls=found["elastic"]["calls"])
    for load_name in LOADS:
        seconds = {name: found[name]["seconds"][load_name] for name in ORDER}
        ratio = statistics.median(seconds["elastic"]) / statistics.median(seconds["vanilla"])
        record.add(**{load_name: {"median_ratio": ratio, "seconds": seconds}})
        shown = ", ".join(f"{n} {statistics.median(s):.4f}" for n, s in seconds.items())
        print(f"{load_name:10} {shown} s, ratio {ratio:.4f}", flush=True)
    print(f"same text: {is_same}; calls {found['elastic']['calls']}", flush=True)


def engine(model: Path, lock: Path, num_pairs: int, *, tiny: bool) -> dict[str, Any]:
    """Be one of the engines of `steps`."""
    from vllm import LLM, SamplingParams

    is_elastic = os.environ["ENABLE_KVCACHED"] == "1"
    arguments: dict[str, Any] = {"enable_prefix_caching": False, "seed": 0}
    if tiny:
        arguments |= {"dtype": "float32", "enforce_eager": True}
    else:
        arguments |= {"load_format": "dummy", "compilation_config": GRAPHS}
    if not is_elastic:
        arguments |= {"kv_cache_memory_bytes": (256 * MIB) if tiny else 20 * GIB}
        arguments |= {"gpu_memory_utilization": 0.5 if tiny else 0.05}
    llm = LLM(str(model), max_model_len=2048, **arguments)

    def run(num: int, num_in: int, num_out: int) -> tuple[float, Any]:
        num = max(num // 8, 1) if tiny else num
        prompts = [
            {"prompt_token_ids": [3 + (7 * n + i) % 400 for i in range(num_in)]} for n in range(num)
        ]
        sampling = SamplingParams(temperature=0, max_tokens=num_out, ignore_eos=True)
        start = time.perf_counter()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - start, [list(o.outputs[0].token_ids) for o in outputs]

    seconds: dict[str, list[float]] = {name: [] for name in LOADS}
    tokens = {name: run(*workload)[1] for name, workload in LOADS.items()}
    for _ in range(num_pairs):
        for name, workload in LOADS.items():
            with lock.open() as turn:
                fcntl.flock(turn, fcntl.LOCK_EX)
                run(2, 10, 4)
                seconds[name].append(run(*workload)[0])
            time.sleep(0.02)  # let the other one have the turn
    calls: dict[str, Any] = {}
    if is_elastic:
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        statistics_ = worker.kvcached.backend.statistics
        calls = {verb: found.num_calls for verb, found in statistics_.verbs.items()}
    return {"seconds": seconds, "tokens": tokens, "calls": calls}


def main() -> None:
    """Measure, print a table, write JSON."""
    arguments = parser(__doc__)
    arguments.add_argument("--pairs", type=int, default=8)
    arguments.add_argument("--model", type=Path, help="be an engine of this model")
    arguments.add_argument("--lock", type=Path, help="the turn that the engines take")
    options = arguments.parse_args()
    if options.model is not None:
        found = engine(options.model, options.lock, options.pairs, tiny=options.tiny)
        options.json.write_text(json.dumps(found))
        sys.stdout.flush()
        os._exit(0)  # an engine in this process would take seconds to tear down
    with bench_run(options) as (setting, record):
        steps(setting, record, options.pairs)


if __name__ == "__main__":
    main()
