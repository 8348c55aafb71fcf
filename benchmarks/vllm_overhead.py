"""vLLM's servers with us against without, on a GPU: throughput, latency, memory, neighbours.

    python benchmarks/vllm_overhead.py serve --json benchmarks/results/vllm_overhead.json
    python benchmarks/vllm_overhead.py neighbours --json benchmarks/results/vllm_neighbours.json
    python benchmarks/vllm_overhead.py steps --json benchmarks/results/vllm_steps.json

`serve` starts one vanilla and one elastic server side by side and sends both the same requests in
turn, with vLLM's own `vllm bench serve`; each figure is a ratio of a pair. `neighbours` starts two
elastic servers while a first one serves, sends bursts of 60 % of the KV space to two of them in
turn, and then one to a vanilla server with half of it. `steps` runs one engine of each kind without
a server, and lets them decode and prefill in turn under one lock: what a step costs, and nothing
else. The model has the shape of Llama-3.1-8B and
dummy weights. `--tiny` is a rehearsal on vLLM's CPU engine.
"""

import argparse
import asyncio
import contextlib
import fcntl
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from machine import describe_gpu, describe_machine

from kvcached_core.cli.demo.model import make_model
from kvcached_core.cli.demo.server import EngineServer
from kvcached_core.ledger import InstanceView, Ledger
from kvcached_core.units import GIB, MIB

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers.shapes import make_shape

RATIOS = {
    "output_throughput": "output throughput",
    "mean_ttft_ms": "mean TTFT",
    "p99_ttft_ms": "p99 TTFT",
    "mean_tpot_ms": "mean TPOT",
    "p99_tpot_ms": "p99 TPOT",
}
QUIET_SECONDS = 2.0
BURST_SHARE = 0.6
SMALL_FOLDER = {"TMPDIR": "/tmp"}  # noqa: S108  vLLM's sockets need a short path


class Setting:
    """What runs where: the model, the servers' arguments and the workloads."""

    def __init__(self, folder: Path, *, tiny: bool, runner: int | None) -> None:
        self.folder = folder
        self.tiny = tiny
        self.num_started = 0
        self.environ = SMALL_FOLDER | {"VLLM_LOGGING_LEVEL": "INFO"}
        if tiny:
            self.model = make_model(folder / "tiny", seed=1)
            self.kv_bytes = 256 * MIB
            self.kv_bytes_per_token = 32 * 1024
            self.workloads = [("saturation", 100, 16, "inf", 12), ("8 req/s", 100, 16, "8", 12)]
            self.arguments: tuple[str, ...] = ()
            self.environ["KVCACHED_HOST_POOL"] = "512MiB"
        else:
            self.model = make_shape(folder / "llama-8b", "llama-8b")
            self.kv_bytes = 50 * GIB
            self.kv_bytes_per_token = 128 * 1024
            self.workloads = [
                ("512/128 at saturation", 512, 128, "inf", 500),
                ("512/128 at 8 req/s", 512, 128, "8", 160),
                ("1913/162 at saturation", 1913, 162, "inf", 500),
            ]
            self.arguments = ("--load-format", "dummy", "--max-model-len", "8192")
        if runner is not None:
            self.environ["VLLM_USE_V2_MODEL_RUNNER"] = str(runner - 1)
            self.workloads = self.workloads[:1]

    def start(self, name: str, *, elastic: bool, kv_bytes: int | None = None) -> EngineServer:
        """Start a server; a vanilla one gets `kv_bytes` of KV cache."""
        sizes: tuple[str, ...] = ()
        if not elastic:
            utilization = "0.5" if self.tiny else "0.05"
            sizes = ("--kv-cache-memory-bytes", str(kv_bytes or self.kv_bytes))
            sizes += ("--gpu-memory-utilization", utilization)
        environ = self.environ | {"ENABLE_KVCACHED": str(int(elastic)), "KVCACHED_NAME": name}
        environ["KVCACHED_DIR"] = str(self.folder / "kv")
        options: dict[str, Any] = {"options": ()}
        if self.tiny:
            self.num_started += 1
            options = {"core": self.num_started}
        return EngineServer(
            name,
            self.model,
            self.folder,
            environ=environ,
            arguments=(*self.arguments, "--no-enable-prefix-caching", *sizes),
            **options,
        )

    def view(self, name: str) -> InstanceView:
        """Return what the ledger says of an instance."""
        (path,) = (self.folder / "kv").glob("*.ledger")
        with Ledger(path) as ledger:
            return next(view for view in ledger.view().instances if view.name == name)

    def bench(  # noqa: PLR0917  the workload is a tuple
        self, server: EngineServer, num_in: int, num_out: int, rate: str, num: int, seed: int
    ) -> dict[str, Any]:
        """Run `vllm bench serve` against a server and return its figures."""
        from vllm.benchmarks.serve import add_cli_args, main_async

        try:
            from vllm.utils.argparse_utils import FlexibleArgumentParser
        except ImportError:
            from vllm.utils import FlexibleArgumentParser
        parser = FlexibleArgumentParser()
        add_cli_args(parser)
        words = [
            *("--backend", "openai", "--base-url", server.url, "--endpoint", "/v1/completions"),
            *("--model", server.name, "--tokenizer", str(self.model)),
            *("--dataset-name", "random", "--random-input-len", str(num_in)),
            *("--random-output-len", str(num_out), "--num-prompts", str(num)),
            *("--request-rate", rate, "--seed", str(seed), "--ignore-eos", "--disable-tqdm"),
            *("--percentile-metrics", "ttft,tpot,itl", "--metric-percentiles", "50,99"),
        ]
        silent = io.StringIO()
        with contextlib.redirect_stdout(silent):
            result = asyncio.run(main_async(parser.parse_args(words)))
        figures = {key: result[key] for key in (*RATIOS, "completed", "duration")}
        return figures | {"failed": num - result["completed"]}


def wait_all(servers: list[EngineServer]) -> dict[str, float]:
    """Wait until all servers answer; return the seconds that each took since now."""
    start = time.perf_counter()
    ready: dict[str, float] = {}
    while len(ready) < len(servers):
        for server in servers:
            if server.name not in ready:
                if server.process.poll() is not None:
                    server.wait_ready()  # raises with the log
                if server.is_ready():
                    ready[server.name] = time.perf_counter() - start
        time.sleep(0.05)
    return ready


def metric(server: EngineServer, name: str) -> float:
    """Return one of the server's own metrics."""
    for line in httpx.get(f"{server.url}/metrics", timeout=10).text.splitlines():
        if line.startswith(name) and not line.startswith("#"):
            return float(line.rsplit(" ", 1)[1])
    return float("nan")


class Watch:
    """Samples a server's running and waiting requests, and what it holds."""

    def __init__(self, setting: Setting, server: EngineServer, *, elastic: bool) -> None:
        self.peaks = {"running": 0.0, "waiting_behind_running": 0.0, "resident_bytes": 0.0}
        self._setting, self._server, self._elastic = setting, server, elastic
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Watch":  # noqa: PYI034
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.2):
            running = metric(self._server, "vllm:num_requests_running")
            self.peaks["running"] = max(self.peaks["running"], running)
            if self._elastic:
                view = self._setting.view(self._server.name)
                held = max(self.peaks["resident_bytes"], view.resident_bytes)
                self.peaks["resident_bytes"] = held


def serve(setting: Setting, num_pairs: int) -> dict[str, Any]:
    """Compare one vanilla and one elastic server."""
    servers = {name: setting.start(name, elastic=name == "elastic") for name in ORDER}
    results: dict[str, Any] = {"ready_seconds": wait_all(list(servers.values()))}
    page_bytes = setting.view("elastic").page_bytes
    results["page_bytes"] = page_bytes
    results["resident_pages_after_start"] = setting.view("elastic").resident_bytes / page_bytes
    print(f"ready: {results['ready_seconds']}", flush=True)
    try:
        _, num_in, num_out, _, num = setting.workloads[0]
        for server in servers.values():  # the first requests of a server and of the client are slow
            setting.bench(server, num_in, num_out, "inf", min(num, 100), seed=0)
        for label, *workload in setting.workloads:
            runs = []
            for pair in range(num_pairs):
                order = ORDER if pair % 2 == 0 else ORDER[::-1]
                pairs = {n: setting.bench(servers[n], *workload, seed=pair + 1) for n in order}
                time.sleep(QUIET_SECONDS)
                held = setting.view("elastic").resident_bytes / page_bytes
                runs.append(pairs | {"resident_pages_after": held})
            results[label] = summary(runs)
            print_summary(label, results[label])
        results["preemptions"] = {n: metric(s, PREEMPTIONS) for n, s in servers.items()}
    finally:
        for server in servers.values():
            server.kill()
    return results


ORDER = ("vanilla", "elastic")
PREEMPTIONS = "vllm:num_preemptions_total"


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the runs and the median ratio of each figure over their pairs."""
    ratios = {
        figure: [run["elastic"][figure] / run["vanilla"][figure] for run in runs]
        for figure in RATIOS
    }
    return {
        "median_ratio": {figure: statistics.median(values) for figure, values in ratios.items()},
        "ratios": ratios,
        "runs": runs,
    }


def print_summary(label: str, result: dict[str, Any]) -> None:
    """Print one workload's ratios."""
    print(label)
    for figure, name in RATIOS.items():
        absolute = [
            statistics.median(run[server][figure] for run in result["runs"]) for server in ORDER
        ]
        spread = result["ratios"][figure]
        print(
            f"  {name:18} vanilla {absolute[0]:9.2f}  elastic {absolute[1]:9.2f}  ratio "
            f"{result['median_ratio'][figure]:.4f}  ({min(spread):.4f} to {max(spread):.4f})"
        )
    failed = sum(run[server]["failed"] for run in result["runs"] for server in ORDER)
    pages = max(run["resident_pages_after"] for run in result["runs"])
    print(f"  failed {failed}, pages resident 2 s after {pages}", flush=True)


@contextlib.contextmanager
def load(setting: Setting, server: EngineServer, rate: str) -> Iterator[dict[str, Any]]:
    """Send requests at a rate while the block runs; what came of them is in the result then."""
    result: dict[str, Any] = {}
    stop = threading.Event()

    def run() -> None:
        completed = failed = 0
        while not stop.is_set():
            done = setting.bench(server, 256, 32, rate, 40, seed=7)
            completed, failed = completed + done["completed"], failed + done["failed"]
        result.update(completed=completed, failed=failed)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield result
    finally:
        stop.set()
        thread.join()


def burst(setting: Setting, server: EngineServer, num: int, *, elastic: bool) -> dict[str, Any]:
    """Send `num` requests at once and say how they fared."""
    before = metric(server, PREEMPTIONS)
    num_in, num_out = (100, 16) if setting.tiny else (1913, 162)
    with Watch(setting, server, elastic=elastic) as watch:
        figures = setting.bench(server, num_in, num_out, "inf", num, seed=3)
    result = figures | watch.peaks | {"requests": num}
    result["preemptions"] = metric(server, PREEMPTIONS) - before
    shown = ("requests", "completed", "failed", "running", "preemptions", "resident_bytes")
    print(
        f"burst on {server.name}: " + ", ".join(f"{k} {result[k]:.0f}" for k in shown), flush=True
    )
    return result


def neighbours(setting: Setting, num_starts: int) -> dict[str, Any]:
    """Start servers beside one that serves, and send bursts to two of them in turn."""
    first = setting.start("first", elastic=True)
    servers = [first]
    results: dict[str, Any] = {"first_ready_seconds": wait_all([first])["first"]}
    try:
        with load(setting, first, "8") as under_load:
            names = ["second", "third"][:num_starts]
            servers += [setting.start(name, elastic=True) for name in names]
            results["ready_seconds_beside"] = wait_all(servers[1:])
        results["load_meanwhile"] = under_load
        print(f"started beside: {results['ready_seconds_beside']}, {under_load}", flush=True)
        views = {server.name: setting.view(server.name) for server in servers}
        results["virtual_bytes"] = {name: view.virtual_bytes for name, view in views.items()}
        if num_starts == 2:  # noqa: PLR2004
            servers.pop().kill()
        time.sleep(QUIET_SECONDS)
        space = kv_space(setting, [server.name for server in servers])
        results["kv_space_bytes"] = space
        num = max(int(BURST_SHARE * space / setting.kv_bytes_per_token / tokens(setting)), 1)
        for server in servers:
            results[f"burst_{server.name}"] = burst(setting, server, num, elastic=True)
            time.sleep(QUIET_SECONDS)
    finally:
        for server in servers:
            server.kill()
    half = setting.start("half", elastic=False, kv_bytes=space // 2)
    try:
        wait_all([half])
        results["burst_vanilla_half"] = burst(setting, half, num, elastic=False)
    finally:
        half.kill()
    return results


def tokens(setting: Setting) -> int:
    """Return the tokens of one request of a burst."""
    return 116 if setting.tiny else 1913 + 162


def kv_space(setting: Setting, names: list[str]) -> int:
    """Return what is free for KV caches beside the engines' weights, in bytes."""
    held = sum(setting.view(name).resident_bytes for name in names)
    if setting.tiny:
        return 512 * MIB
    from kvcached_core.devices import free_memory_reader

    (path,) = (setting.folder / "kv").glob("*.ledger")
    with Ledger(path) as ledger:
        headroom = int(ledger.capacity_bytes * 0.02 / 0.98)
    return free_memory_reader(path.stem)() + held - headroom


STEP_LOADS = {  # prompts, tokens in, tokens out
    "decode 8": (8, 100, 128),
    "decode 64": (64, 100, 128),
    "prefill": (64, 1000, 1),
}


def steps(setting: Setting, num_pairs: int) -> dict[str, Any]:
    """Compare an engine of each kind, in processes that take turns."""
    lock = setting.folder / "turn"
    lock.touch()
    children = {}
    for name in ORDER:
        environ = os.environ | setting.environ | {"ENABLE_KVCACHED": str(int(name == "elastic"))}
        environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        environ["KVCACHED_DIR"] = str(setting.folder / "kv")
        command = [sys.executable, __file__, "engine", "--json", str(setting.folder / name)]
        command += ["--pairs", str(num_pairs), "--model", str(setting.model), "--lock", str(lock)]
        command += ["--tiny"] if setting.tiny else []
        with (setting.folder / f"{name}.log").open("w") as log:
            children[name] = subprocess.Popen(command, env=environ, stdout=log, stderr=log)
    for child in children.values():
        child.wait()
    found = {name: json.loads((setting.folder / name).read_text()) for name in ORDER}
    results: dict[str, Any] = {
        "is_same_text": found["vanilla"]["tokens"] == found["elastic"]["tokens"]
    }
    for load_name in STEP_LOADS:
        seconds = {name: found[name]["seconds"][load_name] for name in ORDER}
        ratio = statistics.median(seconds["elastic"]) / statistics.median(seconds["vanilla"])
        results[load_name] = {"median_ratio": ratio, "seconds": seconds}
        shown = ", ".join(f"{n} {statistics.median(s):.4f}" for n, s in seconds.items())
        print(f"{load_name:10} {shown} s, ratio {ratio:.4f}", flush=True)
    results["calls"] = found["elastic"]["calls"]
    print(f"same text: {results['is_same_text']}; calls {results['calls']}", flush=True)
    return results


def engine(model: Path, lock: Path, num_pairs: int, *, tiny: bool) -> dict[str, Any]:
    """Be one of the engines of `steps`."""
    from vllm import LLM, SamplingParams

    is_elastic = os.environ["ENABLE_KVCACHED"] == "1"
    arguments: dict[str, Any] = {"enable_prefix_caching": False, "seed": 0}
    arguments |= {"dtype": "float32", "enforce_eager": True} if tiny else {"load_format": "dummy"}
    if not is_elastic:
        arguments |= {"kv_cache_memory_bytes": (256 * MIB) if tiny else 20 * GIB}
        arguments |= {"gpu_memory_utilization": 0.5 if tiny else 0.05}
    llm = LLM(str(model), max_model_len=2048, **arguments)

    def run(num: int, num_in: int, num_out: int) -> tuple[float, Any]:
        prompts = [
            {"prompt_token_ids": [3 + (7 * n + i) % 400 for i in range(num_in)]} for n in range(num)
        ]
        sampling = SamplingParams(temperature=0, max_tokens=num_out, ignore_eos=True)
        start = time.perf_counter()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - start, [list(o.outputs[0].token_ids) for o in outputs]

    seconds: dict[str, list[float]] = {name: [] for name in STEP_LOADS}
    tokens = {name: run(*workload)[1] for name, workload in STEP_LOADS.items()}
    for _ in range(num_pairs):
        for name, workload in STEP_LOADS.items():
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("serve", "neighbours", "steps", "engine"))
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--lock", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--starts", type=int, default=2, help="servers to start beside the first")
    parser.add_argument("--runner", type=int, choices=(1, 2), help="vLLM's model runner")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    if options.part == "engine":
        found = engine(options.model, options.lock, options.pairs, tiny=options.tiny)
        options.json.write_text(json.dumps(found))
        sys.stdout.flush()
        os._exit(0)  # an engine in this process would take seconds to tear down
    with tempfile.TemporaryDirectory(prefix="kv-", ignore_cleanup_errors=True) as folder:
        setting = Setting(Path(folder), tiny=options.tiny, runner=options.runner)
        machine = describe_machine() if options.tiny else describe_gpu()
        results: dict[str, Any] = {"machine": machine}
        try:
            if options.part == "serve":
                results |= serve(setting, options.pairs)
            elif options.part == "steps":
                results |= steps(setting, options.pairs)
            else:
                results |= neighbours(setting, options.starts)
        finally:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(results, indent=2) + "\n")
            for log in Path(folder).glob("*.log"):
                text = log.read_text(errors="replace")
                (options.json.parent / f"{options.json.stem}-{log.name}").write_text(text[-20000:])


if __name__ == "__main__":
    main()
