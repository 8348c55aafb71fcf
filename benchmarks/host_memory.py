"""What the host backend, the ledger and the imports cost on this machine, in CPU time."""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from parts.machine import describe_machine
from parts.record import write

from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.opening import ledger_directory
from kvcached_core.memory.arena import Arena
from kvcached_core.memory.geometry import Geometry
from kvcached_core.memory.vmm.host import HostBackend
from kvcached_core.units import GIB, MIB

IMPORT = "import time; t = time.process_time(); import {}; print(time.process_time() - t)"
CLOCK = time.thread_time  # what else runs on the machine does not count


def times_of(call: Callable[[], object], rounds: int) -> list[float]:
    """Return the seconds of each call."""
    seconds = []
    for _ in range(rounds):
        start = CLOCK()
        call()
        seconds.append(CLOCK() - start)
    return seconds


def pages() -> dict[str, list[float]]:
    """Return seconds per page of 16 MiB, memory touched before and given back."""
    geometry = Geometry(block_bytes=65536, num_planes=32, ids_per_page=256, blocks_per_page=8)
    arena = Arena(HostBackend(), geometry, 64)
    arena.map(range(32))
    arena.unmap(range(32))

    def map_one() -> None:
        arena.map([len(arena.resident_pages)])

    def unmap_one() -> None:
        arena.unmap([len(arena.resident_pages) - 1])

    mapped = times_of(map_one, 32)
    unmapped = times_of(unmap_one, 32)
    arena.close()
    return {"map a page of 16 MiB": mapped, "unmap it": unmapped}


def ledger_operations() -> dict[str, list[float]]:
    """Return seconds of the ledger's operations with eight rows, nobody else at it."""
    with tempfile.TemporaryDirectory() as name:
        directory = ledger_directory(Path(name) / "kv")
        with Ledger(directory / "host.ledger", GIB) as ledger:
            rows = [ledger.register(name=f"i{number}", engine="bench") for number in range(8)]
            page = 16 * MIB
            ledger.promise(rows[0], page, page)

            def reserve_and_cancel() -> None:
                ledger.promise(rows[1], page, page)
                ledger.cancel(rows[1], page)

            return {
                "ledger: reserve and cancel": times_of(reserve_and_cancel, 5000),
                "ledger: view of 8 instances": times_of(ledger.view, 200),
            }


def imports() -> dict[str, list[float]]:
    """Return seconds of importing, in fresh processes."""
    results = {}
    for module in (
        "kvcached_core",
        "kvcached_core.ledger.ledger",
        "kvcached_core.config",
        "kvcached_vllm",
    ):
        results[f"import {module}"] = [
            float(
                subprocess.run(
                    [sys.executable, "-c", IMPORT.format(module)],
                    capture_output=True,
                    text=True,
                    check=True,
                ).stdout
            )
            for _ in range(5)
        ]
    return results


def main() -> None:
    """Measure everything and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    arguments = parser.parse_args()
    times = {**pages(), **ledger_operations(), **imports()}
    results = {what: statistics.median(seconds) for what, seconds in times.items()}
    for what, seconds in results.items():
        print(f"{what:32} {seconds * 1e6:12.1f} us")
    if arguments.json:
        cuts = {what: statistics.quantiles(seconds) for what, seconds in times.items()}
        report = {"machine": describe_machine(), "seconds": results, "quartiles": cuts}
        write(arguments.json, report)


if __name__ == "__main__":
    main()
