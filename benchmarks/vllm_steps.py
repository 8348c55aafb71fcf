"""What a step costs with us and without, and nothing else: one engine of each kind, in turn.

    python benchmarks/vllm_steps.py --json benchmarks/results/vllm_steps.json

Two engines without servers get the same loads, under one lock, so that they take turns from one
second to the next and a machine that changes its speed changes it for both. The parts of a step are
timed where they run, in the engine's thread.
"""

import fcntl
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from record import Record
from vllm_servers import Setting, add_also, also_named, bench_run, parser

from kvcached_core.units import GIB, MIB
from kvcached_vllm.worker import inner_worker

VANILLA, CONTROL = "vanilla", "control"
# CUDA graphs for decoding and no compilation, which takes a minute and is not what is compared.
GRAPHS = {
    "mode": 0,
    "cudagraph_mode": "FULL_DECODE_ONLY",
    "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64],
}
ARRIVALS_PER_SECOND = 8
NUM_KERNELS_SHOWN = 8
PAUSE_MS = 0.02


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


def steps(setting: Setting, record: Record, options: Any) -> None:
    """Compare engines, in processes that take turns: vanilla ones, one with each page size.

    A second vanilla one, the control, shows how far two processes differ that do the same.
    """
    num_pairs, loads = options.pairs, options.loads
    switches = switches_of(options)
    lock = setting.servers.workspace / "turn"
    lock.touch()
    children = {}
    for name, switch in switches.items():
        environ = os.environ | setting.environ | switch
        environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        environ["KVCACHED_DIR"] = str(setting.servers.workspace / "kv")
        command = [sys.executable, __file__, "--json", str(setting.servers.workspace / name)]
        command += ["--pairs", str(num_pairs), "--model", str(setting.model), "--lock", str(lock)]
        command += ["--num-engines", str(len(switches)), "--loads", *loads]
        command += ["--kv-gib", str(options.kv_gib)]
        command += ["--tiny"] if setting.tiny else []
        with (setting.servers.workspace / f"{name}.log").open("w") as log:
            children[name] = subprocess.Popen(command, env=environ, stdout=log, stderr=log)
    for child in children.values():
        child.wait()
    found = {name: json.loads((setting.servers.workspace / name).read_text()) for name in switches}
    for name in list(switches)[1:]:
        is_same = found[VANILLA]["tokens"] == found[name]["tokens"]
        calls = found[name]["calls"]
        record.add(**{name: {"is_same_text": is_same, "calls": calls}})
        print(f"{name}: same text {is_same}, calls {calls}", flush=True)
    for load_name in loads:
        runs = {name: found[name]["runs"][load_name] for name in switches}
        medians, ratios = compare(runs)
        record.add(**{load_name: {"vanilla": medians, "median_ratios": ratios, "runs": runs}})
        print(load_name)
        kernels = {name: found[name]["kernels"].get(load_name, {}) for name in switches}
        record.add(**{f"{load_name}, kernels of {name}": of for name, of in kernels.items()})
        for name in ratios:
            print_kernels(kernels[VANILLA], kernels[name], name)
        for figure, value in medians.items():
            shown = "  ".join(f"{name} {of_name[figure]:.4f}" for name, of_name in ratios.items())
            print(f"  {figure:40} vanilla {value:10.3f}  {shown}", flush=True)
        for name in ratios:
            for figure in ("steps with driver calls", "steps with driver calls, median us"):
                value = statistics.median(run[figure] for run in runs[name])
                print(f"  {figure:40} {name} {value:10.3f}", flush=True)


def switches_of(options: Any) -> dict[str, dict[str, str]]:
    """Return the variables of each engine, by its name."""
    vanillas = [VANILLA] if options.no_control else [VANILLA, CONTROL]
    switches = {name: {"ENABLE_KVCACHED": "0"} for name in vanillas}
    for size in options.page_sizes:
        switches[f"pages-{size}"] = {"ENABLE_KVCACHED": "1", "KVCACHED_PAGE_BYTES": size}
    for name, settings in also_named(options).items():
        switches[name] = {"ENABLE_KVCACHED": "1", **settings}
    return switches


def compare(
    runs: dict[str, list[dict[str, float]]],
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Return vanilla's median of each figure, and the others' median ratios of pairs."""
    vanilla = runs[VANILLA]
    figures = [figure for figure in vanilla[0] if all(run[figure] for run in vanilla)]
    medians = {figure: statistics.median(run[figure] for run in vanilla) for figure in figures}
    ratios = {
        name: {
            figure: statistics.median(
                own[figure] / base[figure] for own, base in zip(of_name, vanilla, strict=True)
            )
            for figure in figures
        }
        for name, of_name in runs.items()
        if name != VANILLA
    }
    return medians, ratios


class Stopwatch:
    """Times the parts of an engine's step, in the engine's own thread.

    Args:
        core: The engine core.
        count_calls: Returns how often the driver mapped and unmapped so far, in whatever thread.
    """

    def __init__(self, core: Any, count_calls: Callable[[], int]) -> None:
        self.starts: list[float] = []
        self.num_calls: list[int] = []
        self._count_calls = count_calls
        self.seconds: dict[str, list[float]] = {part: [] for part in PARTS}
        for owner, part in zip(
            (core.scheduler, core.model_executor, core.scheduler), PARTS, strict=True
        ):
            setattr(owner, part, self._timed(part, getattr(owner, part)))

    def _timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = call(*args, **kwargs)
            self.seconds[part].append(time.perf_counter() - start)
            if part == PARTS[0]:
                self.starts.append(start)
                self.num_calls.append(self._count_calls())
            return result

        return timed

    def take(self) -> dict[str, float]:
        """Return the medians since the last call, in microseconds."""
        between = [after - before for before, after in itertools.pairwise(self.starts)]
        medians = {f"{part}, median us": _median(self.seconds[part]) for part in PARTS}
        medians["step to step, median us"] = _median(between)
        medians["step to step, longest ms"] = max(between, default=0.0) * 1e3
        has_calls = [after > before for before, after in itertools.pairwise(self.num_calls)]
        with_calls = list(itertools.compress(between, has_calls))
        without = [span for span, has in zip(between, has_calls, strict=True) if not has]
        medians["steps without driver calls, median us"] = _median(without)
        medians["steps with driver calls, median us"] = _median(with_calls)
        medians["steps with driver calls"] = len(with_calls)
        self.starts.clear()
        self.num_calls.clear()
        for values in self.seconds.values():
            values.clear()
        return medians


def _median(seconds: list[float]) -> float:
    return statistics.median(seconds or [0.0]) * 1e6


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


def profile(driver: Driver, load: Load) -> dict[str, list[float]]:
    """Return the milliseconds and the calls of each kernel of one more run on the device itself."""
    from torch.profiler import ProfilerActivity, profile, supported_activities

    if ProfilerActivity.CUDA not in supported_activities():
        return {}
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        driver.run(load)
    times: dict[str, list[float]] = {}
    spans = []
    for event in found.profiler.kineto_results.events():
        if str(event.device_type()).endswith("CUDA") and event.duration_ns():
            name = str(event.name())[:100]
            sums = times.setdefault(name, [0.0, 0])
            sums[0] += event.duration_ns() / 1e6
            sums[1] += 1
            spans.append((event.start_ns(), event.start_ns() + event.duration_ns()))
    return times | idle_times(sorted(spans))


def idle_times(spans: list[tuple[int, int]]) -> dict[str, list[float]]:
    """Return the milliseconds in which nothing ran and the pauses, by the length of the pause."""
    pauses: dict[str, list[float]] = {
        label: [0.0, 0] for label in ("(idle)", "(idle, pauses above 20 us)")
    }
    latest = spans[0][1] if spans else 0
    for start, end in spans:
        pause_ms = (start - latest) / 1e6
        for label, least_ms in zip(pauses, (0, PAUSE_MS), strict=True):
            if pause_ms > least_ms:
                pauses[label][0] += pause_ms
                pauses[label][1] += 1
        latest = max(latest, end)
    return pauses


def longer(
    of_vanilla: dict[str, list[float]], of_other: dict[str, list[float]]
) -> dict[str, float]:
    """Return by how many ms each kernel took longer than vanilla's would have in as many calls.

    Two runs differ in how many steps they make; what a call takes does not depend on that.
    """
    return {
        name: of_other[name][0] - ms * of_other[name][1] / num_calls
        for name, (ms, num_calls) in of_vanilla.items()
        if num_calls and name in of_other
    }


def print_kernels(
    of_vanilla: dict[str, list[float]], of_other: dict[str, list[float]], name: str
) -> None:
    """Print the kernels whose calls differ most."""
    more = longer(of_vanilla, of_other)
    print(f"  kernels of {name}: {sum(more.values()):+.2f} ms in as many calls as vanilla's")
    for key in sorted(more, key=lambda key: -abs(more[key]))[:NUM_KERNELS_SHOWN]:
        ms, num_calls = of_vanilla[key]
        print(f"    {more[key]:+8.2f} ms, {ms / num_calls * 1e3:8.2f} us a call  {key}", flush=True)


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
        kernels = {name: profile(driver, load) for name, load in loads.items()}
    return {
        "runs": runs,
        "tokens": tokens,
        "kernels": kernels,
        "calls": {verb: meter.times().num_calls for verb, meter in driver.meters.items()},
        "is_asynchronous": bool(core.async_scheduling),
    }


def main() -> None:
    """Measure, print a table, write JSON."""
    arguments = parser(__doc__)
    arguments.add_argument("--pairs", type=int, default=8)
    arguments.add_argument("--model", type=Path, help="be an engine of this model")
    arguments.add_argument("--lock", type=Path, help="the turn that the engines take")
    arguments.add_argument("--num-engines", type=int, help="how many take turns")
    arguments.add_argument(
        "--page-sizes", nargs="+", default=["16MiB", "64MiB"], help="one elastic engine with each"
    )
    add_also(arguments)
    arguments.add_argument("--loads", nargs="+", choices=LOADS, default=list(LOADS))
    arguments.add_argument("--kv-gib", type=int, default=24, help="a vanilla engine's KV cache")
    arguments.add_argument("--no-control", action="store_true", help="leave the control out")
    options = arguments.parse_args()
    if options.model is not None:
        found = engine(options)
        options.json.write_text(json.dumps(found))
        sys.stdout.flush()
        os._exit(0)  # an engine in this process would take seconds to tear down
    with bench_run(options) as (setting, record):
        steps(setting, record, options)


if __name__ == "__main__":
    main()
