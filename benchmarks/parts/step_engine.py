"""One of the engines that `vllm_steps` compares: in a process of its own, with its own loads."""

import fcntl
import os
import statistics
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

from parts.step_kernels import profile
from parts.stopwatch import Stopwatch

from kvcached_core.units import GIB, MIB
from kvcached_vllm.worker import inner_worker

# CUDA graphs for decoding and no compilation, which takes a minute and is not what is compared.
GRAPHS = {
    "mode": 0,
    "cudagraph_mode": "FULL_DECODE_ONLY",
    "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64],
}
ARRIVALS_PER_SECOND = 8


@dataclass(frozen=True)
class Load:
    """Some requests; `rate` is how many come in a second, 0 for all at once."""

    num_prompts: int
    num_in: int
    num_out: int
    rate: int = 0


LOADS = {
    "decode 8": Load(8, 100, 128),
    "decode 64": Load(64, 100, 128),
    "prefill": Load(32, 1000, 1),
    "saturation": Load(250, 512, 128),
    "1913/162": Load(80, 1913, 162),
    "8 req/s": Load(24, 512, 128, ARRIVALS_PER_SECOND),
}
PARTS = ("schedule", "execute_model", "update_from_output")


class Driver:
    """Gives an engine in this process a load and times each request."""

    def __init__(self, llm: Any, *, tiny: bool) -> None:
        self._engine = llm.llm_engine
        self._tiny = tiny
        self._num_requests = 0
        core = self._engine.engine_core.engine_core
        memory = getattr(inner_worker(core.model_executor.driver_worker), "kvcached", None)
        arena = memory.arena if memory is not None else None
        self.meters = {"map": arena.maps, "unmap": arena.unmaps} if arena is not None else {}
        self.watch = Stopwatch(core, self.count_calls)

    def count_calls(self) -> int:
        """Return how many pages were mapped and unmapped so far; always 0 without us."""
        return sum(meter.times().num_calls for meter in self.meters.values())

    def run(self, load: Load) -> tuple[dict[str, float], list[list[int]]]:
        """Carry out a load; return its figures and the tokens of each request."""
        from vllm import SamplingParams

        num = max(load.num_prompts // 8, 1) if self._tiny else load.num_prompts
        sampling = SamplingParams(temperature=0, max_tokens=load.num_out, ignore_eos=True)
        begin = time.perf_counter()
        waiting = [(begin + (n / load.rate if load.rate else 0.0), n) for n in range(num)]
        arrived: dict[str, float] = {}
        first: dict[str, float] = {}
        last: dict[str, float] = {}
        tokens: dict[str, list[int]] = {}
        while waiting or len(tokens) < num:
            now = time.perf_counter()
            while waiting and waiting[0][0] <= now:
                due, n = waiting.pop(0)
                self._num_requests += 1
                name = str(self._num_requests)
                arrived[name] = due
                prompt = {"prompt_token_ids": [3 + (7 * n + i) % 400 for i in range(load.num_in)]}
                self._engine.add_request(name, prompt, sampling)
            if len(tokens) == len(arrived):
                time.sleep(0.0005)
                continue
            for output in self._engine.step():
                now = time.perf_counter()
                name = output.request_id
                if output.outputs[0].token_ids:
                    first.setdefault(name, now)
                last[name] = now
                if output.finished:
                    tokens[name] = list(output.outputs[0].token_ids)
        figures = {"seconds": time.perf_counter() - begin}
        figures["mean TTFT, ms"] = statistics.mean(first[n] - arrived[n] for n in first) * 1e3
        if load.num_out > 1:
            spans = [(last[n] - first[n]) / (load.num_out - 1) * 1e3 for n in first]
            figures["mean TPOT, ms"] = statistics.mean(spans)
            figures["p99 TPOT, ms"] = statistics.quantiles(spans, n=100)[98] if num > 1 else 1.0
        return figures | self.watch.take(), [tokens[n] for n in sorted(tokens, key=int)]


def engine(options: Any) -> dict[str, Any]:
    """Be one of the engines of `steps`."""
    from vllm import LLM

    model, lock, tiny = options.model, options.lock, options.tiny
    num_pairs, num_engines, names = options.pairs, options.num_engines, options.loads
    is_elastic = os.environ["ENABLE_KVCACHED"] == "1"
    arguments: dict[str, Any] = {"enable_prefix_caching": False, "seed": 0}
    if tiny:
        arguments |= {"dtype": "float32", "enforce_eager": True}
    else:
        arguments |= {"load_format": "dummy", "compilation_config": GRAPHS}
    if not is_elastic:
        arguments |= {"kv_cache_memory_bytes": (256 * MIB) if tiny else options.kv_gib * GIB}
        arguments |= {"gpu_memory_utilization": 0.5 if tiny else 0.05}
    llm = LLM(str(model), max_model_len=2176, **arguments)
    core = llm.llm_engine.engine_core.engine_core
    driver = Driver(llm, tiny=tiny)
    loads = {name: LOADS[name] for name in names}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in loads}
    with lock.open() as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        tokens = {name: driver.run(load)[1] for name, load in loads.items() if not load.rate}
    lock.with_name(f"{os.getpid()}.ready").touch()
    while len(list(lock.parent.glob("*.ready"))) < num_engines:
        time.sleep(0.1)
    for _ in range(num_pairs):
        for name, load in loads.items():
            with lock.open() as turn:
                fcntl.flock(turn, fcntl.LOCK_EX)
                driver.run(Load(2, 10, 4))
                runs[name].append(driver.run(load)[0])
            time.sleep(0.02)  # let the other one have the turn
    with lock.open() as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        kernels = {name: profile(partial(driver.run, load)) for name, load in loads.items()}
    return {
        "runs": runs,
        "tokens": tokens,
        "kernels": kernels,
        "calls": {verb: meter.times().num_calls for verb, meter in driver.meters.items()},
        "is_asynchronous": bool(core.async_scheduling),
    }
