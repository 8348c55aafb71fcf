"""Weights that come and go, with real servers: what a request to a yielded model waits for.

    python benchmarks/weights_wake.py --json benchmarks/results/gpu/weights_wake_h200.json

Two models of one shape and different weights share a device; a third server is vanilla's with its
own sleep mode. Each part is a run of its own, and tokens are compared with those of the beginning.
`--engine sglang` does without the third one; `SGLANG_PYTHON` names its interpreter. `--tiny`
rehearses the logic on a CPU, whose times say nothing.
"""

import random
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import httpx
from parts.link import gigabytes_per_second
from parts.making_room import cache, give, turns
from parts.ordered import value_at
from parts.residue import context_bytes, parts, used_bytes, yielded
from parts.vllm_servers import READY_SECONDS
from parts.yielding import (
    FIRST,
    NUM_PROMPT_TOKENS,
    SECOND,
    Run,
    first_tokens_after_sleeps,
    make_parser,
    recorded_run,
)

from kvcached_core.units import GIB, MIB
from kvcached_core.weights.image import MAX_COPY_BYTES
from kvcached_demo.harness.engines import VLLM

VANILLA = "vanilla"
NUM_SLEEPS_OF_VANILLA = 5
PARTS = ("copy", "held", "free", "half", "turns", "cache", "give", "beside", "vanilla")
# How much of the weights is copied at a time in the part beside a busy neighbour: a whole page,
# what a wake copies, and less.
COPY_BYTES_TRIED = (64 * MIB, MAX_COPY_BYTES, 4 * MIB)


def copy(run: Run, _num: int) -> dict[str, Any]:
    """Measure how fast pinned host memory is copied to the device."""
    if run.tiny:
        return {}
    return {"gigabytes_per_second": gigabytes_per_second()}


def held(run: Run, _num: int) -> dict[str, Any]:
    """Look how much of the device both have when they are awake, and when they have yielded."""
    names = (FIRST, SECOND)
    awake, context = used_bytes(run), context_bytes(run)
    rows = {name: run.view(name).weights_bytes for name in names}
    torchs = yielded(run, *names)
    time.sleep(1.0)
    used = used_bytes(run)
    pages = {name: run.view(name).resident_bytes for name in names}
    each = (used - run.used_before_bytes) // len(run.servers.by_name)
    return {
        "weights_bytes": rows,
        "used_bytes_before": run.used_before_bytes,
        "used_bytes_awake": awake,
        "used_bytes_yielded": used,
        "resident_bytes_yielded": pages,
        "held_bytes_each": each,
        "parts_bytes": {
            name: parts(each, context, pages[name], torchs.get(name, {})) for name in names
        },
        "largest": {name: found["largest"] for name, found in torchs.items()},
        "pinned": {name: found["pinned"] for name, found in torchs.items()},
    }


def free(run: Run, num: int) -> dict[str, Any]:
    """Ask a model that has yielded all of its weights, with room free."""
    return first_tokens_after_sleeps(run, num, num_awake=20)


def half(run: Run, num: int) -> dict[str, Any]:
    """Ask a model half of whose weights are there: of two that were idle, the other gave all."""
    seconds, shares = [], []
    run.sleep(SECOND)
    for _ in range(num // 4):
        run.first_token_seconds(FIRST)
        view = run.view(FIRST)
        with run.taken(run.room_bytes() + view.weights_bytes // 2):
            pass
        view = run.view(FIRST)
        shares.append(view.weights_bytes / view.weights_needed_bytes)
        seconds.append(run.first_token_seconds(FIRST))
    return {"seconds": seconds, "shares": shares}


def beside(run: Run, num: int) -> dict[str, Any]:
    """Look at the steps of a busy model while the other one wakes, and while nobody does."""
    windows: list[tuple[float, float, str]] = []
    stop = threading.Event()
    gaps: list[tuple[float, float]] = []
    worker = threading.Thread(target=_stream, args=(run, gaps, stop))
    run.first_token_seconds(SECOND)
    worker.start()
    try:
        for _ in range(max(num // 6, 3)):
            for size in COPY_BYTES_TRIED if run.engine is VLLM else (MAX_COPY_BYTES,):
                run.ask(FIRST)  # a call from outside has its weights there, and what it sets, too
                if run.engine is VLLM:
                    run.call(FIRST, "set_copy_bytes", size)
                run.sleep(FIRST)
                time.sleep(0.5)
                start = time.perf_counter()
                end = start + run.first_token_seconds(FIRST)
                windows.append((start, end, f"{size // MIB} MiB"))
    finally:
        stop.set()
        worker.join()
    during: dict[str, list[float]] = {}
    since: dict[str, list[float]] = {}
    first_token: dict[str, list[float]] = {}
    for begin, end, size_name in windows:
        overlapping = [(at - begin, gap) for at, gap in gaps if begin <= at <= end]
        first_token.setdefault(size_name, []).append(end - begin)
        during.setdefault(size_name, []).extend(gap for _, gap in overlapping)
        since.setdefault(size_name, []).extend(at for at, _ in overlapping)
    calm = [
        gap
        for at, gap in gaps
        if not any(begin - 0.05 <= at <= end + 0.25 for begin, end, _ in windows)
    ]
    return {
        "calm_seconds": calm,
        "overlapping_seconds": during,
        "overlapping_since_request_seconds": since,
        "first_token_seconds": first_token,
        "ratio": {
            name: statistics.median(each) / statistics.median(calm) for name, each in during.items()
        },
    }


def _stream(run: Run, gaps: list[tuple[float, float]], stop: threading.Event) -> None:
    """Let the second server answer, and note how far apart its tokens come."""
    source = random.Random(1)
    server, dialect = run.servers[SECOND], run.engine.dialect
    while not stop.is_set():
        prompt = [source.randrange(3, 500) for _ in range(NUM_PROMPT_TOKENS)]
        body = dialect.body(SECOND, tuple(prompt), 400 if run.tiny else 4000)
        last = None
        with httpx.stream("POST", f"{server.url}{dialect.path}", json=body, timeout=120) as answer:
            for line in answer.iter_lines():
                if not line.startswith("data: {"):
                    continue
                now = time.perf_counter()
                if last is not None:
                    gaps.append((now, now - last))
                last = now
                if stop.is_set():
                    return


def vanilla(run: Run, _num: int) -> dict[str, Any]:
    """Measure vLLM's own sleep mode: how long it falls asleep, and from a wake to the tokens."""
    if run.tiny:
        return {}
    server = run.servers[VANILLA]
    run.ask(VANILLA)
    falling, first, last = [], [], []
    for _ in range(NUM_SLEEPS_OF_VANILLA):
        start = time.perf_counter()
        server.post("/sleep?level=1").raise_for_status()
        falling.append(time.perf_counter() - start)
        start = time.perf_counter()
        server.post("/wake_up").raise_for_status()
        woken = time.perf_counter() - start
        first.append(woken + run.first_token_seconds(VANILLA))
        last.append(time.perf_counter() - start)
    return {
        "sleep_seconds": falling,
        "wake_to_first_token_seconds": first,  # as our own rows
        "wake_to_last_token_seconds": last,
    }


MEASURES: dict[str, Callable[[Run, int], dict[str, Any]]] = {
    "copy": copy,
    "held": held,
    "free": free,
    "half": half,
    "turns": turns,
    "cache": cache,
    "give": give,
    "beside": beside,
    "vanilla": vanilla,
}


def table(results: dict[str, Any]) -> str:
    """Return the figures as text."""
    lines = [f"failed {results.get('failed')}, wrong tokens {results.get('wrong')}"]
    for name in PARTS:
        part = results.get(name, {})
        for key, values in part.items():
            if key in ("largest", "pinned"):  # they are for the record
                continue
            rows = values if isinstance(values, dict) else {"": values}
            for label, row in rows.items():
                words = f"{name:8} {key} {label}"
                if isinstance(row, list) and row:
                    tail = value_at(95, row)
                    lines.append(
                        f"{words:48} n {len(row):5}  median {statistics.median(row):10.4f}"
                        f"  p95 {tail:10.4f}  max {max(row):10.4f}"
                    )
                elif isinstance(row, dict):
                    sizes = ", ".join(f"{what} {size / MIB:.0f}" for what, size in row.items())
                    lines.append(f"{words:48} MiB: {sizes}")
                else:
                    lines.append(f"{words:48} {row}")
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--number", type=int, default=100, help="requests of the first part")
    parser.add_argument("--parts", default=",".join(PARTS), help="which, and in which order")
    options = parser.parse_args()
    wanted, errors = options.parts.split(","), dict[str, str]()
    is_vllm = options.engine == VLLM.name
    if not is_vllm and VANILLA in wanted:
        wanted.remove(VANILLA)
    with recorded_run(options) as (run, record):
        run.environ["MEMORY_HISTORY"] = "1"  # until all are ready
        run.used_before_bytes = used_bytes(run)
        begin = time.monotonic()
        run.start(FIRST, 1)
        run.start(SECOND, 2, is_caching="cache" in wanted)
        if VANILLA in wanted and not options.tiny:
            size = ("--kv-cache-memory-bytes", str(2 * GIB), "--gpu-memory-utilization", "0.2")
            run.start(VANILLA, 3, "--enable-sleep-mode", *size, is_elastic=False)
        run.servers.wait_ready(seconds=READY_SECONDS)
        record.add(ready_seconds=time.monotonic() - begin)
        for name in run.servers.by_name if is_vllm else ():
            run.call(name, "end_history")
        for name in (FIRST, SECOND):
            run.ask(name)
        record.add(copied_seconds=run.wait_copied(FIRST, SECOND))
        for part in wanted:
            begin = time.monotonic()
            try:
                record.add(**{part: MEASURES[part](run, options.number)})
            except Exception as error:  # noqa: BLE001  those behind it shall not be lost
                traceback.print_exc()
                errors[part] = repr(error)
                record.add(errors=errors)
            print(part, f"{time.monotonic() - begin:.1f} s", flush=True)
    print(table(record.results))
    if errors:
        sys.exit(f"failed: {errors}")


if __name__ == "__main__":
    main()
