"""An engine's own offloading with us against without: speed, copies, what comes back, on a GPU.

    python benchmarks/offload.py --json benchmarks/results/offload.json
    python benchmarks/offload.py --json benchmarks/results/hicache.json --engine sglang

Three servers of one model stand side by side: vanilla and elastic, both with a host tier of the
same size, and an elastic one without. `--rows` chooses among

* `tokens`: greedy answers of both, before and after the cache was lost;
* `speed`: throughput and times per token while all that is computed is stored, in turn;
* `copies`: GB/s of stores and loads, by vLLM's own counters (vLLM alone);
* `back`: a long prompt computed, and asked again after its cache went to a neighbour;
* `give`: memory given back while stores run, beside the engine that has no tier;
* `disk`: a long prompt that lies in files alone asked again, beside the disk's own speed. It has a
  server of its own, and runs where it is named (vLLM alone).

A row that fails, or takes longer than `--row-seconds`, is named in the record, and the others run.
"""

import contextlib
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from parts.offload_rows import ROWS
from parts.offload_servers import Bench, Sizes
from parts.offload_sglang import sglang_run
from parts.vllm_servers import bench_run, parser
from vllm_overhead import CONTROL

VLLM_ALONE = {"copies", "disk"}
BY_NAME = {"disk"}


def main() -> None:
    """Measure, print, write JSON."""
    arguments = parser(__doc__)
    arguments.add_argument("--engine", choices=("vllm", "sglang"), default="vllm")
    arguments.add_argument("--rows", nargs="+", choices=ROWS)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--tier-gib", type=int, default=20, help="of each server's host tier")
    arguments.add_argument("--kv-gib", type=int, default=18, help="KV cache of each server")
    arguments.add_argument("--num-prompts", type=int, default=160)
    arguments.add_argument("--long-tokens", type=int, default=32_000, help="of `back` and `disk`")
    arguments.add_argument("--row-seconds", type=int, default=600, help="each row takes at most")
    arguments.add_argument("--server-options", default="", help="words for every server")
    arguments.add_argument("--disk", type=Path, help="a new folder, for `--rows disk`")
    arguments.add_argument("--ranks", type=int, default=1, help="GPUs of each server, for `tokens`")
    arguments.add_argument("--control", action="store_true", help="a second vanilla server: noise")
    options = arguments.parse_args()
    options.server_options = shlex.split(options.server_options)
    if options.ranks > 1:
        options.server_options += ["--tensor-parallel-size", str(options.ranks)]
        options.server_options += ["--disable-custom-all-reduce"]
    is_sglang = options.engine == "sglang"
    left_out = BY_NAME | (VLLM_ALONE if is_sglang else set())
    rows = options.rows or [row for row in ROWS if row not in left_out]
    if is_sglang and VLLM_ALONE & set(rows):
        sys.exit(f"SGLang has no row {', '.join(sorted(VLLM_ALONE & set(rows)))}")
    if "disk" in rows and options.disk is None:
        sys.exit("--rows disk needs --disk, a new folder on the disk that is measured")
    run = sglang_run if is_sglang else bench_run
    with run(options) as (setting, record):
        bench = Bench(setting, record, Sizes(options))
        control = (CONTROL,) if options.control else ()
        bench.start(list(dict.fromkeys((*(n for row in rows for n in ROWS[row][1]), *control))))
        failed = {}
        for row in rows:
            started = time.monotonic()
            try:
                with time_limit(options.row_seconds):
                    record.add(**{row: ROWS[row][0](bench)})
            except Exception as error:  # noqa: BLE001  the servers are there, and the others' time
                failed[row] = f"{type(error).__name__}: {error}"
                record.add(failed=failed)
            seconds = time.monotonic() - started
            print(f"{row}: {failed.get(row, 'done')}, {seconds:.0f} s", flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise `TimeoutError` in a block that takes longer; in the main thread only."""

    def end(*_: object) -> None:
        raise TimeoutError(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


if __name__ == "__main__":
    main()
