"""A sleeping model whose replica is on the GPU beside: what a request to it waits for.

    python benchmarks/replica_wake.py --json benchmarks/results/gpu/replica_wake_h200.json

Two vLLM servers have the same weights, each on a GPU of its own; `KVCACHED_WEIGHTS_REPLICAS=1`. One
sleeps and is asked, first while the other one is awake, then without it, out of host memory.
`--tiny` rehearses with two servers on one CPU, whose times say nothing.
"""

import argparse
import time
from typing import Any

from parts.record import Record, begin_record, command_line
from parts.vllm_servers import READY_SECONDS
from parts.yielding import FIRST, SECOND, running, seconds_after_sleeps
from weights_ranks import Ranks, seconds_lines

from kvcached_demo.harness.engines import VLLM

BAR_SECONDS = 0.15
MODEL, SEED = "model", 1
# Behind its host copy, until a server is found by replicas.
FOUND_SECONDS = 2.0


def measure(run: Ranks, record: Record, options: argparse.Namespace) -> None:
    """Start both, and ask the one that sleeps, beside its replica and alone."""
    for card, name in enumerate((FIRST, SECOND)):
        place = {} if options.tiny else {"CUDA_VISIBLE_DEVICES": str(card)}
        eager = ("--enforce-eager",) if options.eager else ()
        run.start(name, SEED, *eager, model_name=MODEL, KVCACHED_WEIGHTS_REPLICAS="1", **place)
    record.add(ready_seconds=run.servers.wait_ready(seconds=READY_SECONDS))
    answers = [run.ask(name).token_ids for name in (FIRST, SECOND)]
    if answers[0] != answers[1]:
        raise RuntimeError("the servers answer differently: they are no replicas")
    record.add(copied_seconds=run.wait_all_copied())
    time.sleep(FOUND_SECONDS)
    record.add(awake_seconds=[run.first_token_seconds(FIRST) for _ in range(10)])
    record.add(replica_seconds=seconds_after_sleeps(run, options.number))
    run.servers[SECOND].kill()
    record.add(host_seconds=seconds_after_sleeps(run, options.number))


def table(results: dict[str, Any]) -> str:
    """Return the figures as text."""
    first = f"failed {results['failed']}, wrong tokens {results['wrong']}, bar {BAR_SECONDS} s"
    names = ("awake_seconds", "replica_seconds", "host_seconds")
    return "\n".join([first, *seconds_lines(results, *names)])


def main() -> None:
    """Run the command line."""
    arguments = command_line(__doc__, can_rehearse=True)
    arguments.add_argument(
        "--number", type=int, default=20, help="how often it sleeps, of each kind"
    )
    arguments.add_argument("--eager", action="store_true", help="no compilation")
    options = arguments.parse_args()
    record = begin_record(options)
    record.add(engine=f"{VLLM.title} {VLLM.release()}", bar_seconds=BAR_SECONDS)
    with running(Ranks, record, tiny=options.tiny, runner=None) as run:
        measure(run, record, options)
    print(table(record.results))


if __name__ == "__main__":
    main()
