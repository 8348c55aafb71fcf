"""Races between copies to the host and memory that goes, with holds and without.

    python benchmarks/offload_race.py --json benchmarks/results/offload_race.json

A vLLM engine on the CPU with its OffloadingConnector answers requests, while others end, are
aborted and preempted, its cache is reset, it sleeps, and a neighbour asks for its memory. Copies
take up to 50 ms. Once a copy keeps the pages that it reads, and once none does: then the engine is
expected to end. `tests/vllm/test_offloading.py` runs the same.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from parts.machine import describe_machine
from parts.record import Record

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers.engines import offline_in
from helpers.offload_runs import ANSWERED, GONE, end_of, race

from kvcached_demo.harness.model import make_model

WORDS = {True: "with_holds", False: "without_holds"}


def summary(races: list[dict[str, Any]]) -> dict[str, Any]:
    """Return how many races ended in which way, and all of them."""
    ends = [one["end"] for one in races]
    return {
        "num_races": len(races),
        "num_answered": ends.count(ANSWERED),
        "num_gone": sum(any(word in end for word in GONE) for end in ends),
        "races": races,
    }


def main() -> None:
    """Race, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--num-requests", type=int, default=500)
    parser.add_argument("--only", choices=WORDS.values(), help="one of both")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    record = Record(options.json)
    record.add(machine=describe_machine(), num_requests=options.num_requests)
    with tempfile.TemporaryDirectory(prefix="kvcached-race-") as folder:
        model = make_model(Path(folder) / "tiny-llama", seed=1)
        for holds, word in WORDS.items():
            if options.only not in {None, word}:
                continue
            races: list[dict[str, Any]] = []
            for seed in options.seeds:
                here = Path(folder) / f"{seed}-{holds}"
                here.mkdir()
                started = time.monotonic()
                run = race(
                    offline_in(here, model),
                    here,
                    seed=seed,
                    num_requests=options.num_requests,
                    holds=holds,
                )
                seconds = round(time.monotonic() - started, 1)
                one = {"seed": seed, "end": end_of(run), "seconds": seconds}
                races.append(one | (run.report if run.returncode == 0 else {}))
                print(f"holds {holds}, seed {seed}: {one['end']} ({seconds:.0f} s)", flush=True)
                record.add(**{word: summary(races)})


if __name__ == "__main__":
    main()
