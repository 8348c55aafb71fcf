"""What a start takes to compare an installed engine with its lock, and what parsing would take.

    python benchmarks/lock_check.py --json benchmarks/results/lock_check.json

It asks the Python of each engine: this one, and that which `SGLANG_PYTHON` names.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from parts.machine import describe_machine
from parts.record import write

from kvcached_patches import locks
from kvcached_patches.engines import ENGINES
from kvcached_patches.locks import read_lock

NUM_ROUNDS = 9
CLOCK = time.process_time  # what else runs on the machine does not count


def read_without_files(distribution: str, release: str) -> locks.Lock | None:
    """Return a lock that knows no file, so that each is parsed."""
    lock = read_lock(distribution, release)
    return None if lock is None else replace(lock, files={})


def measure() -> dict[str, Any]:
    """Return the CPU seconds of each round, for the engines of this Python."""
    results = {}
    for engine in ENGINES.values():
        found = engine.installed()
        if found is None:
            continue
        seconds: dict[str, list[float]] = {"as_locked": [], "parsed": []}
        for _ in range(NUM_ROUNDS):
            for name, read in (("as_locked", read_lock), ("parsed", read_without_files)):
                with patch.object(locks, "read_lock", read):
                    start = CLOCK()
                    misfit = engine.misfit(found)
                    seconds[name].append(CLOCK() - start)
                if misfit:
                    raise SystemExit(misfit)
        results[f"{engine.title} {found.release}"] = seconds
    return results


def main() -> None:
    """Measure, print, write JSON."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--json", type=Path)
    options = made.parse_args()
    if options.json is None:
        print(json.dumps(measure()))
        return
    results = {}
    for python in dict.fromkeys((sys.executable, os.environ.get("SGLANG_PYTHON", sys.executable))):
        done = subprocess.run([python, __file__], check=True, stdout=subprocess.PIPE, text=True)
        results |= json.loads(done.stdout.splitlines()[-1])
    for name, seconds in results.items():
        print(name, {part: sorted(each)[len(each) // 2] for part, each in seconds.items()})
    record = {"machine": describe_machine(), "cpu_seconds": results}
    write(options.json, record)


if __name__ == "__main__":
    main()
