"""Two equally busy vLLM schedulers on one pool, beside two with half of it each, in virtual time.

    python benchmarks/equal_schedulers.py --json benchmarks/results/equal_schedulers.json

Sharing has nothing to gain here: both always want more than half. There is no model: vLLM's own
managers of a KV cache, our hooks, pools and ledger, and a clock that is set. A step takes a fixed
time and some for each of its tokens; mapping and unmapping a page takes what it was measured to
take. So nothing that the machine does beside changes a number, and what is left are the decisions:
who is let in, who is preempted, and who finds a prefix.
"""

import tempfile
from collections.abc import Sequence
from typing import Any

from parts.equal_asks import SIDES, Clients
from parts.machine import describe_machine
from parts.record import command_line, shown, write
from parts.virtual_engine import BLOCK_BYTES, NUM_PLANES, Elastic, hook
from parts.virtual_scheduler import Scheduler, Sizes, make_manager, play
from parts.virtual_time import begin, clock

from kvcached_core.units import MIB

SIZES = Sizes(2048, 2048, 16, 0.010, 0.0002, is_caching=True)
MAP_SECONDS = (0.0066, 0.0014)  # mapping and unmapping a page, as measured on a host


def count(schedulers: Sequence[Scheduler], seconds: float) -> dict[str, Any]:
    """Let schedulers make their steps for so long; return what came of all of them."""
    end = clock.seconds + seconds
    play(schedulers, lambda at: at < end)
    clock.seconds = end
    names = schedulers[0].counts
    total: dict[str, Any] = {name: sum(one.counts[name] for one in schedulers) for name in names}
    total["hit_rate"] = total["found_in_the_cache"] / max(total["prompt_tokens"], 1)
    return total | {"answers_of_each": [one.counts["answers"] for one in schedulers]}


def play_vanilla(num_clients: int, seconds: float, pool_bytes: int) -> dict[str, Any]:
    """Play two schedulers that have half of the pool each."""
    schedulers = [Scheduler(side, SIZES, Clients(side, num_clients)) for side in SIDES]
    for each in schedulers:
        each.begin(make_manager(pool_bytes // (BLOCK_BYTES * NUM_PLANES) // len(SIDES), SIZES))
    return count(schedulers, seconds)


def play_elastic(num_clients: int, seconds: float, pool_bytes: int) -> dict[str, Any]:
    """Play two schedulers that share the pool."""
    with tempfile.TemporaryDirectory(prefix="kv-") as folder:
        schedulers = [
            Elastic(
                pool_bytes,
                MAP_SECONDS,
                *(side, SIZES, Clients(side, num_clients)),
                KVCACHED_DIR=folder,
            )
            for side in SIDES
        ]
        return count(schedulers, seconds)


def main() -> None:
    """Play both, print, write JSON."""
    begin()
    arguments = command_line(__doc__)
    arguments.add_argument("--seconds", type=float, default=60.0, help="of virtual time")
    arguments.add_argument("--clients", type=int, default=8, help="of each scheduler")
    arguments.add_argument("--pool-mib", type=int, default=256)
    options = arguments.parse_args()
    machine = describe_machine()
    hook()
    words = (options.clients, options.seconds, options.pool_mib * MIB)
    results: dict[str, Any] = {
        "machine": machine,
        "virtual_seconds": options.seconds,
        "clients_of_each": options.clients,
        "pool_bytes": options.pool_mib * MIB,
        "vanilla": play_vanilla(*words),
        "elastic": play_elastic(*words),
    }
    results["ratio"] = results["elastic"]["answers"] / results["vanilla"]["answers"]
    write(options.json, results)
    print(shown(results))


if __name__ == "__main__":
    main()
