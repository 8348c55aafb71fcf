r"""More models than fit on a device: their weights take turns, and nobody is refused.

    python benchmarks/weights_many.py --json benchmarks/results/gpu/weights_many_h200.json

Servers of one shape, each with weights of its own, share a device that is made as small as
`--device-gib` by a headroom. They are asked in turn and at random, one or two requests at a time,
and every answer is compared with the model's first. `--tiny` rehearses it on vLLM's CPU engine.

    python benchmarks/weights_many.py --models 30 --shape llama-1b --disk FOLDER \\
        --host-budget 25GiB --json benchmarks/results/gpu/weights_disk_h200.json

Here images of weights that the host budget has no room for lie on a disk.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from parts.gateway_serve import headroom_bytes
from parts.ordered import value_at
from parts.record import Record, begin_record, command_line
from parts.vllm_servers import READY_SECONDS
from parts.yielding import Run, running

from kvcached_core.units import MIB
from kvcached_core.weights.moves import read_moves

NUM_AT_ONCE = 2  # requests
NUM_TOGETHER = 4  # models that load at the same time
# Of a rehearsal: what each keeps, and what half of them cannot have at a time.
TINY_PAGE_BYTES, TINY_WEIGHTS_BYTES = 16 * MIB, 12 * MIB


def ask_all(
    run: Run, names: Iterator[str], seconds: float, tell: Callable[[dict[str, Any]], None]
) -> None:
    """Send a request to each of the names, a new one every so often, two at most at a time.

    Args:
        run: The servers.
        names: Which are asked, in turn.
        seconds: Between two requests.
        tell: Told what was found so far, with each request.
    """
    times: list[float | None] = []
    begin = time.monotonic()

    def ask(name: str) -> None:
        times.append(run.ask(name).ttft_seconds)

    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        for name in names:
            pool.submit(ask, name)
            time.sleep(seconds)
            tell({"seconds": times, "took_seconds": time.monotonic() - begin})
    tell({"seconds": times, "took_seconds": time.monotonic() - begin})


def add(record: Record, word: str, found: dict[str, Any]) -> None:
    """Record what was found in one order, as far as it got."""
    record.add(**{word: found})


def table(results: dict[str, Any]) -> str:
    """Return the figures as text."""
    lines = [f"failed {results.get('failed')}, wrong tokens {results.get('wrong')}"]
    for name in ("in turn", "at random"):
        times = sorted(one for one in results.get(name, {}).get("seconds", []) if one is not None)
        if times:
            p50, p99 = statistics.median(times), value_at(99, times)
            lines.append(
                f"{name:10} n {len(times)}  TTFT p50 {p50:.3f} s, p99 {p99:.3f} s, "
                f"max {times[-1]:.3f} s"
            )
    lines.append(f"activations {results.get('activations')}")
    if moves := results.get("disk"):
        lines.append(f"from the disk {moves['num_read']} in {moves['read_seconds']:.2f} s")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    arguments = command_line(__doc__, can_rehearse=True)
    arguments.add_argument("--runner", type=int, choices=(1, 2), help="vLLM's model runner")
    arguments.add_argument("--models", type=int, default=6)
    arguments.add_argument("--number", type=int, default=300, help="requests of each order")
    arguments.add_argument("--seconds", type=float, default=0.5, help="between two requests")
    arguments.add_argument("--device-gib", type=float, default=80.0)
    arguments.add_argument("--shape", default="llama-8b", help="of each model, on a GPU")
    arguments.add_argument("--disk", type=Path, help="a folder for images of weights")
    arguments.add_argument("--host-budget", default="85%", help="for copies of weights")
    arguments.add_argument("--eager", action="store_true", help="no compilation")
    return arguments.parse_args()


@contextmanager
def disk_of(options: argparse.Namespace) -> Iterator[Path | None]:
    """Yield a folder on the disk that images go to, which goes afterwards; None without one."""
    if options.disk is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="kv-", dir=options.disk) as folder:
        yield Path(folder)


def main() -> None:
    """Run the command line."""
    options = arguments()
    record = begin_record(options)
    pages, weights = TINY_PAGE_BYTES * (options.models + 1), TINY_WEIGHTS_BYTES * options.models
    words = {"pool_bytes": pages + weights // 2, "shape": options.shape}
    with (
        disk_of(options) as disk,
        running(Run, record, tiny=options.tiny, runner=options.runner, **words) as run,
    ):
        run.environ["KVCACHED_HOST_BUDGET"] = options.host_budget
        if disk is not None:
            run.environ["KVCACHED_WEIGHTS_DISK"] = str(disk)
        if not options.tiny:
            headroom = headroom_bytes(record.results["machine"], options.device_gib)
            run.environ["KVCACHED_HEADROOM"] = str(headroom)
        names = [f"model-{number}" for number in range(options.models)]
        begin = time.monotonic()
        for number, name in enumerate(names):
            run.start(name, number, *(("--enforce-eager",) if options.eager else ()))
            if options.tiny:  # two cores
                run.servers.wait_ready(name)
            elif number == NUM_TOGETHER - 1:  # those that come later need what these give
                run.servers.wait_ready(seconds=READY_SECONDS)
                run.wait_copied(*names[:NUM_TOGETHER])
        run.servers.wait_ready(seconds=READY_SECONDS)
        record.add(ready_seconds=time.monotonic() - begin)
        for name in names:
            run.ask(name)
        record.add(copied_seconds=run.wait_copied(*names))
        source = random.Random(1)
        orders = {
            "in turn": list(islice(cycle(names), options.number)),
            "at random": [source.choice(names) for _ in range(options.number)],
        }
        for word, order in orders.items():
            tell = partial(add, record, word)
            ask_all(run, iter(order), options.seconds, tell)
        views = [run.view(name) for name in names]
        record.add(activations=sum(view.activations.num for view in views))
        if disk is not None:
            record.add(disk=asdict(read_moves(disk)))
    print(table(record.results))


if __name__ == "__main__":
    main()
