"""Weights of a model over several GPUs that come and go, with a real vLLM server.

    python benchmarks/weights_ranks.py --json benchmarks/results/gpu/weights_ranks_h200.json
    python benchmarks/weights_ranks.py --json FILE --shape llama-8b --ranks 2

One server of a 70B shape with dummy weights has a tensor-parallel rank on each GPU. The speed of
each GPU's link is measured alone and with all at once; then the model yields, and one request waits
for its weights on all ranks. `--tiny` rehearses with two ranks on a CPU, whose times say nothing.
"""

import argparse
import statistics
import time
from typing import Any

from parts.giving import wait_offered
from parts.link import gigabytes_per_second
from parts.record import Record, begin_record, command_line
from parts.vllm_servers import READY_SECONDS, WITHOUT_MULTICAST
from parts.yielding import FIRST, Run, running

from kvcached_core import control
from kvcached_core.ledger.view import InstanceView
from kvcached_core.units import GIB, MIB
from kvcached_demo.harness.engines import VLLM

TINY_POOL_BYTES = 512 * MIB


def links(num_ranks: int) -> dict[str, Any]:
    """Measure how fast pinned host memory is copied to each GPU: alone, and to all at once."""
    ranks = range(num_ranks)
    return {
        "alone_gigabytes_per_second": [gigabytes_per_second([rank]) for rank in ranks],
        "at_once_gigabytes_per_second_each": gigabytes_per_second(ranks),
    }


class Ranks(Run):
    """Servers on more than one GPU: a row is in the ledger of each."""

    def rows(self) -> list[InstanceView]:
        """Return the rows of all devices."""
        found = control.devices(self.servers.directory)
        return [row for device in found for row in device.instances]

    def wait_all_copied(self) -> float:
        """Wait until every rank's weights are in host memory."""
        return wait_offered(self.rows, READY_SECONDS)


def measure(run: Ranks, record: Record, options: argparse.Namespace) -> None:
    """Start, and ask the model awake and after each yield."""
    begin = time.monotonic()
    ranks = ("--tensor-parallel-size", str(options.ranks))
    if options.tiny:
        more = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(str(rank) for rank in range(options.ranks))}
    else:
        more = WITHOUT_MULTICAST
        ranks += ("--enforce-eager", "--disable-custom-all-reduce")
    run.start(FIRST, 1, *ranks, **more, KVCACHED_HOST_BUDGET=options.host_budget)
    run.servers.wait_ready(seconds=READY_SECONDS)
    record.add(ready_seconds=time.monotonic() - begin)
    run.ask(FIRST)
    record.add(copied_seconds=run.wait_all_copied())
    record.add(weights_bytes=[row.weights_bytes for row in run.rows()])
    awake = [run.first_token_seconds(FIRST) for _ in range(10)]
    seconds: list[float] = []
    for _ in range(options.number):
        run.sleep(FIRST)
        left = sum(row.weights_bytes for row in run.rows())
        if left:
            raise RuntimeError(f"{left} bytes of the weights stayed where they were")
        seconds.append(run.first_token_seconds(FIRST))
        record.add(awake_seconds=awake, seconds=seconds)


def table(results: dict[str, Any]) -> str:
    """Return the figures as text."""
    lines = [f"{name:36} {results[name]}" for name in ("ready_seconds", "copied_seconds", "links")]
    lines.append(f"failed {results['failed']}, wrong tokens {results['wrong']}")
    sizes = ", ".join(f"{size / GIB:.1f}" for size in results["weights_bytes"])
    lines.append(f"weights of each device, GiB: {sizes}")
    return "\n".join([*lines, *seconds_lines(results, "awake_seconds", "seconds")])


def seconds_lines(results: dict[str, Any], *names: str) -> list[str]:
    """Return a line for each of these rows of seconds that there is."""
    rows = {name: sorted(results[name]) for name in names if results.get(name)}
    return [
        f"{name:16} n {len(row)}  median {statistics.median(row):.4f}  max {row[-1]:.4f}"
        for name, row in rows.items()
    ]


def main() -> None:
    """Run the command line."""
    arguments = command_line(__doc__, can_rehearse=True)
    arguments.add_argument("--shape", default="llama-70b")
    arguments.add_argument("--ranks", type=int, default=2, help="GPUs, with a rank on each")
    arguments.add_argument("--number", type=int, default=20, help="how often it yields")
    arguments.add_argument("--host-budget", default="85%", help="KVCACHED_HOST_BUDGET")
    options = arguments.parse_args()
    record = begin_record(options)
    record.add(engine=f"{VLLM.title} {VLLM.release()}", ranks=options.ranks)
    record.add(shape="tiny" if options.tiny else options.shape)
    record.add(links={} if options.tiny else links(options.ranks))
    words = {"pool_bytes": TINY_POOL_BYTES, "shape": options.shape}
    with running(Ranks, record, tiny=options.tiny, runner=None, **words) as run:
        measure(run, record, options)
    print(table(record.results))


if __name__ == "__main__":
    main()
