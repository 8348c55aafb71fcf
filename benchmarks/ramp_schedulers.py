"""Three schedulers that all ask at the same time, on one pool and with a third each, virtually.

    python benchmarks/ramp_schedulers.py --json benchmarks/results/ramp_schedulers.json

The load is `ramp-together` of `multi_model`: rates that climb to a peak together, 256 tokens in and
2,048 out. All need the same at the same time, so an even split is right, and sharing can only lose.
As in `equal_schedulers` there is no model: what is left are the decisions of vLLM's managers, our
hooks, pools and ledger. A step takes 40 ms, as those of three 8B models did that computed at once,
and a page as long to map as on a GPU.
"""

import json
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from multi_model.workloads import Request, Workload, ramp_together
from parts.machine import describe_machine
from parts.record import command_line, write
from parts.virtual_engine import BLOCK_BYTES, NUM_PLANES, Elastic, hook
from parts.virtual_scheduler import Ask, Scheduler, Sizes, make_manager, play
from parts.virtual_time import begin, clock

from kvcached_core.units import MIB

NAMES = ("first", "second", "third")
STEP_SECONDS = 0.040
SIZES = Sizes(4096, 2048, 256, STEP_SECONDS, 0.00002, is_caching=False)
MAP_SECONDS = (0.0001, 0.00003)  # mapping and unmapping a page of 16 MiB on an H100
# A page has 128 tokens, as one of 16 MiB of an 8B model; a token is a quarter as large here.
PAGE_BYTES = "4MiB"
# The peak, and the pool: 2 GiB have as many tokens as 8 GiB of the 8B models.
LOADS = ((4, 1024), (5, 2048), (6, 2048), (6, 3072), (7, 2048))
# How many times as long as a step a token may take, on average, for a request to be in time.
SCALES = (1.25, 1.5, 2.0)


class Arrivals:
    """A model's schedule, and when its requests were answered.

    Args:
        requests: What is asked, and when.
        begin_seconds: When the schedule begins.
    """

    def __init__(self, requests: Sequence[Request], begin_seconds: float) -> None:
        self._left = [
            Ask([3 + (place * 7 + number) % 490 for place in range(request.num_in)],
                request.num_out, at_seconds=begin_seconds + request.at_seconds)
            for number, request in enumerate(requests)
        ]  # fmt: skip
        self._began: dict[float, float] = {}
        self.num_open = len(self._left)
        self.first_seconds: list[float] = []
        self.token_seconds: list[float] = []

    def due(self, seconds: float) -> Iterable[Ask]:
        """See `Source`."""
        while self._left and self._left[0].at_seconds <= seconds:
            yield self._left.pop(0)

    def began(self, ask: Ask, seconds: float) -> None:
        """See `Source`; one that is computed again has begun before."""
        if ask.at_seconds not in self._began:
            self._began[ask.at_seconds] = seconds
            self.first_seconds.append(seconds - ask.at_seconds)

    def ended(self, ask: Ask, seconds: float) -> None:
        """See `Source`."""
        self.num_open -= 1
        took = seconds - self._began[ask.at_seconds]
        self.token_seconds.append(took / (ask.num_wanted - 1))


def answer(work: Workload, make: Callable[[str, Arrivals], Scheduler]) -> dict[str, Any]:
    """Let a scheduler for each model answer its requests; return what came of all of them."""
    begin_seconds = clock.seconds
    sources = [
        Arrivals(work.of_model(model).requests, begin_seconds) for model in range(work.num_models)
    ]
    schedulers = [make(name, source) for name, source in zip(NAMES, sources, strict=True)]
    play(schedulers, lambda _at: any(source.num_open for source in sources))
    tokens = [seconds for source in sources for seconds in source.token_seconds]
    return {
        "seconds": clock.seconds - begin_seconds,
        "mean_ttft_seconds": statistics.fmean(s for one in sources for s in one.first_seconds),
        "mean_tpot_seconds": statistics.fmean(tokens),
        "preemptions": [one.counts["preemptions"] for one in schedulers],
        "mapped_pages": sum(one.counts["mapped_pages"] for one in schedulers),
        "in_time": {
            str(scale): sum(each <= scale * STEP_SECONDS for each in tokens) for scale in SCALES
        },
    }


def play_split(work: Workload, pool_bytes: int) -> dict[str, Any]:
    """Play schedulers that have an equal part of the pool each."""
    num_blocks = pool_bytes // (BLOCK_BYTES * NUM_PLANES) // work.num_models

    def make(name: str, source: Arrivals) -> Scheduler:
        made = Scheduler(name, SIZES, source)
        made.begin(make_manager(num_blocks, SIZES))
        return made

    return answer(work, make)


def play_shared(work: Workload, pool_bytes: int) -> dict[str, Any]:
    """Play schedulers that share the pool."""
    with tempfile.TemporaryDirectory(prefix="kv-") as folder:
        variables = {"KVCACHED_DIR": folder, "KVCACHED_PAGE_BYTES": PAGE_BYTES}

        def make(name: str, source: Arrivals) -> Elastic:
            return Elastic(pool_bytes, MAP_SECONDS, name, SIZES, source, **variables)

        return answer(work, make)


def main() -> None:
    """Play all loads, print, write JSON."""
    begin()
    arguments = command_line(__doc__)
    arguments.add_argument(
        "--peaks", type=int, nargs="+", help="of the loads, those with these alone"
    )
    options = arguments.parse_args()
    machine = describe_machine()
    hook()
    loads: list[dict[str, Any]] = []
    for peak, pool_mib in LOADS:
        if options.peaks and peak not in options.peaks:
            continue
        work = ramp_together(peak)
        found: dict[str, Any] = {
            "peak": peak,
            "pool_bytes": pool_mib * MIB,
            "num_requests": len(work.requests),
            "split": play_split(work, pool_mib * MIB),
            "shared": play_shared(work, pool_mib * MIB),
        }
        loads.append(found)
        print(json.dumps(found), flush=True)
        write(options.json, {"machine": machine, "loads": loads})


if __name__ == "__main__":
    main()
