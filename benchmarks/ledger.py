"""What one operation on the ledger takes: alone, beside others, and while nobody can have the lock.

    python benchmarks/ledger.py --json benchmarks/results/ledger.json

Contending processes either pause between two operations, as engines do between two steps, or never
stop, which on fewer cores than processes measures the machine's scheduler as well. Readers look
without a pause, as `kvcached top` in a loop. A process that is stopped with the lock makes one call
wait, and none after it; a second time this is measured in a real-time class (root alone may), where
no other program of the machine makes it longer.
"""

import multiprocessing
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from parts.machine import describe_machine
from parts.record import command_line, write

from kvcached_core.ledger.ledger import Ledger
from kvcached_core.units import GIB, MIB

PAGE = 16 * MIB
NUM_ALONE = 20_000
NUM_CONTENDING = 3_000
NUM_PROCESSES = 8
NUM_STOPPED = 20
STOPPED = "lock held by a stopped process, median and longest ms"
PAUSES_SECONDS = {"pause of 1 ms": 1e-3, "pause of 0.2 ms": 2e-4, "no pause": 0.0}


def summary(nanoseconds: list[int]) -> dict[str, float]:
    """Return median and tails in microseconds."""
    cuts = statistics.quantiles(nanoseconds, n=1000)
    named = {"p50": cuts[499], "p99": cuts[989], "p99.9": cuts[998], "max": max(nanoseconds)}
    return {name: value / 1e3 for name, value in named.items()}


def timed(call: Callable[[], Any]) -> int:
    """Return the nanoseconds of one call."""
    start = time.perf_counter_ns()
    call()
    return time.perf_counter_ns() - start


def time_alone(path: Path) -> dict[str, dict[str, float]]:
    """Return what each operation takes when nobody else uses the ledger."""
    with Ledger(path, 64 * GIB) as ledger:
        row = ledger.register(name="alone", engine="benchmark")
        names = ("reserve", "cancel", "settle", "look", "wanted", "room")
        times: dict[str, list[int]] = {name: [] for name in names}
        for _ in range(NUM_ALONE):
            times["reserve"].append(timed(lambda: ledger.promise(row, PAGE, PAGE)))
            times["cancel"].append(timed(lambda: ledger.cancel(row, PAGE)))
            settle = timed(lambda: ledger.settle(row, used_bytes=0, cached_bytes=0))
            times["settle"].append(settle)
            times["look"].append(timed(lambda: ledger.num_notices(row)))
            times["wanted"].append(timed(lambda: ledger.wanted(row)))
            times["room"].append(timed(lambda: ledger.room_bytes(row)))
        ledger.unregister(row)
    return {name: summary(values) for name, values in times.items()}


def contend(path: Path, number: int, pause_seconds: float, start: Any, results: Any) -> None:
    """Reserve and cancel in a process of its own."""
    with Ledger(path, 64 * GIB) as ledger:
        row = ledger.register(name=f"process-{number}", engine="benchmark")
        times = []
        start.wait()
        for _ in range(NUM_CONTENDING):
            times.append(timed(lambda: ledger.promise(row, PAGE, PAGE)))
            times.append(timed(lambda: ledger.cancel(row, PAGE)))
            if pause_seconds:
                time.sleep(pause_seconds)
        results.put(times)
        ledger.unregister(row)


def time_contending(path: Path, pause_seconds: float) -> dict[str, float]:
    """Return what an operation takes while eight processes do it."""
    start = multiprocessing.Barrier(NUM_PROCESSES)
    results: Any = multiprocessing.Queue()
    children = [
        multiprocessing.Process(target=contend, args=(path, number, pause_seconds, start, results))
        for number in range(NUM_PROCESSES)
    ]
    for child in children:
        child.start()
    times = [value for _ in children for value in results.get()]
    for child in children:
        child.join()
    return summary(times)


def look_for_ever(path: Path, started: Any) -> None:
    """Read the ledger without a pause, in a process of its own."""
    with Ledger(path) as ledger:
        while True:
            ledger.view()
            started.set()


def time_beside_readers(path: Path) -> dict[str, float]:
    """Return what reserving and giving back takes beside two processes that only look."""
    with Ledger(path, 64 * GIB) as ledger:
        row = ledger.register(name="engine", engine="benchmark")
        started = multiprocessing.Event()
        readers = [
            multiprocessing.Process(target=look_for_ever, args=(path, started)) for _ in range(2)
        ]
        for reader in readers:
            reader.start()
        started.wait()
        times = []
        for _ in range(NUM_CONTENDING):
            times.append(timed(lambda: ledger.promise(row, PAGE, PAGE)))
            times.append(timed(lambda: ledger.cancel(row, PAGE)))
            time.sleep(1e-3)
        for reader in readers:
            reader.kill()
            reader.join()
        ledger.unregister(row)
    return summary(times)


def hold(path: Path, held: Any) -> None:
    """Take the lock, in a process of its own, and keep it."""
    with Ledger(path, 64 * GIB) as ledger:
        ledger._enter_patiently()  # noqa: SLF001  what is measured is that it does not come out
        held.set()
        signal.pause()


def time_beside_stopped(path: Path) -> dict[str, list[float]]:
    """Return what calls in a row take, in ms, while a stopped process has the lock."""
    with Ledger(path, 64 * GIB) as ledger:
        row = ledger.register(name="engine", engine="benchmark")
        times: dict[str, list[float]] = {"first call": [], "later calls": []}
        for _ in range(NUM_STOPPED):
            held = multiprocessing.Event()
            holder = multiprocessing.Process(target=hold, args=(path, held))
            holder.start()
            held.wait()
            os.kill(holder.pid or 0, signal.SIGSTOP)
            times["first call"].append(timed(lambda: ledger.promise(row, PAGE, PAGE)) / 1e6)
            for _ in range(10):
                times["later calls"].append(timed(lambda: ledger.promise(row, PAGE, PAGE)) / 1e6)
                settle = timed(lambda: ledger.settle(row, used_bytes=0, cached_bytes=0))
                times["later calls"].append(settle / 1e6)
            holder.kill()
            holder.join()
            ledger.cancel(row, PAGE)
        ledger.unregister(row)
    return {name: [statistics.median(values), max(values)] for name, values in times.items()}


@contextmanager
def in_real_time() -> Iterator[None]:
    """Run before every ordinary program of the machine."""
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def main() -> None:
    """Measure, print a table, write JSON."""
    arguments = command_line(__doc__)
    path = arguments.parse_args().json
    results: dict[str, Any] = {"machine": describe_machine()}
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        ledger_path = Path(folder) / "host.ledger"
        results["alone"] = time_alone(ledger_path)
        for name, pause_seconds in PAUSES_SECONDS.items():
            results[f"8 processes, {name}"] = time_contending(ledger_path, pause_seconds)
        results["beside 2 readers"] = time_beside_readers(ledger_path)
        results[STOPPED] = time_beside_stopped(ledger_path)
        with in_real_time():
            results[f"{STOPPED}, in real time"] = time_beside_stopped(ledger_path)
    write(path, results)
    rows = {f"alone: {name}": values for name, values in results["alone"].items()}
    rows |= {name: values for name, values in results.items() if name.startswith(("8", "beside"))}
    for name, values in rows.items():
        print(f"{name:32}" + "".join(f"{key} {value:9.1f} us  " for key, value in values.items()))
    print(results[STOPPED], results[f"{STOPPED}, in real time"])


if __name__ == "__main__":
    main()
