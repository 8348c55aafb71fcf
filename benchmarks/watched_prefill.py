"""A long prompt to an engine whose weights are gone: when each layer began, and each page came.

    python benchmarks/watched_prefill.py --json results/gpu/watched_prefill_h200.json

One vLLM engine of the 8B shape in this process, whose layers wait for their own weights each
(`KVCACHED_WEIGHTS_WAIT=layers`). A round answers a prompt of 8,000 tokens with all weights there,
sleeps, and answers it while they come. Wherever a forward passes a point, the host's clock says
when it did, and an event on the step's stream when the device came there; an event on the stream of
copies says when each page was there. `--ways` does it in several ways, in turn: `WAY=COPY/AHEAD`
names one in which copies have so many bytes, and so many are handed over ahead. `--trace FOLDER`
keeps what torch's profiler saw of one more round of each: every kernel and every copy. `--tiny`
rehearses it on a CPU, which has one clock, and whose times say nothing.
"""

import argparse
import functools
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from parts.record import Record, begin_record, command_line
from parts.vllm_servers import SHORT_FOLDER, make_model, make_shape

from kvcached_core.units import parse_bytes
from kvcached_core.weights import arriving, host_bytes, image
from kvcached_core.weights.walks import Walk
from kvcached_vllm.elastic_weights import weights_of
from kvcached_vllm.worker import inner_worker

NUM_TOKENS, NUM_TINY_TOKENS = 8000, 1500
ENVIRON = {
    "ENABLE_KVCACHED": "1",
    "KVCACHED_WEIGHTS": "yield",
    "KVCACHED_WEIGHTS_WAIT": "layers",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
}
MEMORY_FOLDER = "/dev/shm"  # noqa: S108  what lies on a disk cannot be page-locked
TINY_ENVIRON = {"KVCACHED_HOST_POOL": "1GiB"}
ENGINE = {"enforce_eager": True, "enable_prefix_caching": False}
GPU_ENGINE = ENGINE | {
    "load_format": "dummy",
    "dtype": "bfloat16",
    "max_model_len": 8192,
    "max_num_batched_tokens": 8192,  # the prompt has to fit into one step
}
TINY_ENGINE = ENGINE | {"dtype": "float32", "max_model_len": 2048, "block_size": 32}


@dataclass(frozen=True)
class Way:
    """How weights are copied.

    Attributes:
        name: What the record calls it.
        copy_bytes: Of one copy, at most.
        ahead_bytes: What the device is told of ahead of what it has copied.
    """

    name: str = "as it is"
    copy_bytes: int = host_bytes.MAX_COPY_BYTES
    ahead_bytes: int = arriving.AHEAD_BYTES

    def use(self) -> None:
        """Have later copies go this way."""
        image.MAX_COPY_BYTES, arriving.AHEAD_BYTES = self.copy_bytes, self.ahead_bytes

    @classmethod
    def read(cls, words: str) -> Self:
        """Return the way that `NAME=COPY/AHEAD` says."""
        name, _, sizes = words.partition("=")
        copy, _, ahead = sizes.partition("/")
        return cls(name, parse_bytes(copy, what="copy"), parse_bytes(ahead, what="ahead"))


@dataclass
class Seen:
    """When something was launched, by the host's clock, and the mark that the device passes."""

    host: list[float] = field(default_factory=list)
    marks: list[Any] = field(default_factory=list)


class Watch:
    """What happens while weights arrive.

    Args:
        worker: vLLM's, in this process.
        is_gpu: Whether it has a device with a clock of its own.
    """

    def __init__(self, worker: Any, *, is_gpu: bool) -> None:
        self._is_gpu = is_gpu
        copies = getattr(weights_of(worker).rank.image.backend, "_copies", None)
        self._copies = torch.cuda.ExternalStream(int(copies)) if is_gpu else None
        model = worker.model_runner.get_model()
        model.register_forward_pre_hook(lambda *_: self._see("begun"))
        model.register_forward_hook(lambda *_: self._see("ended"))
        self._behind(Walk, "pass_point", functools.partial(self._see, "points"))
        self._behind(
            arriving.Arriving, "_mark", functools.partial(self._see, "pages", self._copies)
        )
        self.begin()

    def begin(self) -> None:
        """Forget what was seen, and count time from now on."""
        self._seen: dict[str, Seen] = {}
        self._began, self._first = time.perf_counter(), self._mark(None)

    def found(self) -> dict[str, dict[str, list[float]]]:
        """Return when the host and the device came where, in seconds."""
        if self._is_gpu:
            torch.cuda.synchronize()
        return {
            name: {
                "host": [moment - self._began for moment in seen.host],
                "device": [self._seconds(mark) for mark in seen.marks],
            }
            for name, seen in self._seen.items()
        }

    def _behind(self, owner: type, name: str, see: Callable[[], None]) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def seen(*args: Any, **kwargs: Any) -> Any:
            answer = original(*args, **kwargs)
            see()
            return answer

        setattr(owner, name, seen)

    def _see(self, name: str, stream: Any = None) -> None:
        seen = self._seen.setdefault(name, Seen())
        seen.host.append(time.perf_counter())
        seen.marks.append(self._mark(stream))

    def _mark(self, stream: Any) -> Any:
        if not self._is_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream or torch.cuda.current_stream())
        return event

    def _seconds(self, mark: Any) -> float:
        if not self._is_gpu:
            return float(mark - self._first)
        return float(self._first.elapsed_time(mark)) / 1e3


def measure(record: Record, options: argparse.Namespace) -> None:
    """Start the engine, and record each round."""
    from vllm import LLM, SamplingParams

    engine: dict[str, Any] = TINY_ENGINE if options.tiny else GPU_ENGINE
    engine = engine | {"enforce_eager": not options.compiled}
    llm = LLM(str(options.model), **engine)
    core = llm.llm_engine.engine_core.engine_core
    worker = inner_worker(core.model_executor.driver_worker)
    weights = weights_of(worker)
    prompt = [3 + number % 500 for number in range(NUM_TINY_TOKENS if options.tiny else NUM_TOKENS)]
    sampling = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    watch = Watch(worker, is_gpu=not options.tiny)

    def answer() -> dict[str, Any]:
        num_before = num_allocations()
        watch.begin()
        began = time.perf_counter()
        (output,) = llm.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)
        seconds = time.perf_counter() - began
        return {
            "seconds": seconds,
            "tokens": list(output.outputs[0].token_ids),
            "num_allocations": num_allocations() - num_before,
            **watch.found(),
        }

    def num_allocations() -> int:
        """Return how often torch asked the driver for memory."""
        return 0 if options.tiny else int(torch.cuda.memory_stats()["num_device_alloc"])

    answer()  # kernels are loaded, and a forward is watched
    answer()
    weights.rank.copying.join()
    record.add(num_pages=weights.rank.image.num_pages)
    for way in (options.trace and options.ways) or []:
        way.use()
        core.kvcached.sleep()
        with torch.profiler.profile() as profiler:
            answer()
        profiler.export_chrome_trace(str(options.trace / f"{way.name}.json.gz"))
    ways: dict[str, list[dict[str, Any]]] = {way.name: [] for way in options.ways}
    for _, way in itertools.product(range(options.number), options.ways):
        way.use()
        there = answer()
        core.kvcached.sleep()
        together = answer()
        ways[way.name].append({"there": there, "together": together, "behind": answer()})
        record.add(ways=ways)


def table(results: dict[str, Any]) -> str:
    """Return the figures of each way as text."""
    return "\n\n".join(
        f"{name}\n{rows(rounds)}" for name, rounds in results.get("ways", {}).items()
    )


def rows(rounds: list[dict[str, Any]]) -> str:
    """Return the figures of rounds as text: medians, in milliseconds since the prompt."""

    def median(how: str, *path: Any) -> float:
        values = []
        for one in rounds:
            found = one[how]
            for part in path:
                found = found[part]
            values.append(found)
        return 1e3 * statistics.median(values)

    lines = [
        f"{how:10} {median(how, 'seconds'):7.1f} ms" for how in ("there", "together", "behind")
    ]
    lines.append(f"last page there {median('together', 'pages', 'device', -1):.1f}")
    for what in ("begun", "ended"):
        host, device = (median("together", what, clock, -1) for clock in ("host", "device"))
        lines.append(f"forward {what}: host {host:.1f}, device {device:.1f}")
    for number in range(0, len(rounds[0]["together"]["points"]["host"]), 4):
        host, device = (median("together", "points", each, number) for each in ("host", "device"))
        lines.append(f"point {number:2}: host {host:7.1f}, device {device:7.1f}")
    allocations = [one["together"]["num_allocations"] for one in rounds]
    tokens = {tuple(each["tokens"]) for one in rounds for each in one.values()}
    lines.append(f"allocations {allocations}, {len(tokens)} different answers")
    return "\n".join(lines)


def start_child(options: argparse.Namespace) -> int:
    """Run this script where the engine is elastic; return its exit code."""
    with (
        tempfile.TemporaryDirectory(prefix="kv-", dir=SHORT_FOLDER) as folder,
        tempfile.TemporaryDirectory(prefix="kv-", dir=MEMORY_FOLDER) as ours,
    ):
        place = Path(folder) / "model"
        model = make_model(place, seed=1) if options.tiny else make_shape(place, "llama-8b")
        environ = {**os.environ, **ENVIRON, **(TINY_ENVIRON if options.tiny else {})}
        environ["KVCACHED_DIR"] = ours
        command = [sys.executable, __file__, *sys.argv[1:], "--model", str(model)]
        return subprocess.run(command, env=environ, check=False).returncode


def main() -> None:
    """Run the command line."""
    arguments = command_line(__doc__, can_rehearse=True)
    arguments.add_argument("--number", type=int, default=8, help="rounds")
    arguments.add_argument("--compiled", action="store_true", help="no eager engine")
    arguments.add_argument("--ways", nargs="+", type=Way.read, default=[Way()], metavar="WAY")
    arguments.add_argument("--trace", type=Path, help="where traces of one more round go")
    arguments.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.model is None:
        sys.exit(start_child(options))
    record = begin_record(options)
    measure(record, options)
    print(table(record.results), flush=True)
    os._exit(0)  # an engine in this process would take seconds to tear down


if __name__ == "__main__":
    main()
