"""How long what a step does itself waits while gigabytes of weights are on their way to a device.

    python benchmarks/small_copies.py --json benchmarks/results/gpu/small_copies_h200.json

A wake copies weights in pieces of 16 MiB, on a stream of their own. Every 5 ms another thread does
what a step does, on a stream of its own: it copies 4 KiB and waits for them, launches a kernel,
allocates memory of the device, or page-locks some of the host. The pieces are handed to the driver
all at once, as a wake does, or so that no more than some bytes are ahead of what is copied
(`KVCACHED_WEIGHTS_WAIT=layers`). `--tiny` rehearses it on the host backend, whose times say
nothing.
"""

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Self

from parts.record import Record, begin_record, command_line

from kvcached_core.memory.torch_device import release_cached_blocks
from kvcached_core.memory.vmm.backend import Backend
from kvcached_core.memory.vmm.host import HostBackend
from kvcached_core.units import GIB, KIB, MIB, format_bytes
from kvcached_core.weights.host_bytes import MAX_COPY_BYTES, HostBytes

SMALL_BYTES, ALLOCATED_BYTES = 4 * KIB, 32 * MIB
PAUSE_SECONDS = 0.005
AT_ONCE = "at once"
BOUNDS = (32 * MIB, 128 * MIB, 512 * MIB, 2 * GIB)
WINDOW_PAGES, TINY_WINDOW_PAGES = 64, 4  # that the copies go to and come from, again and again


class Copies:
    """Pages of a device and of the host, and copies between them.

    Args:
        backend: The device.
        num_bytes: What is copied in all.
        num_pages: The pages, of `MAX_COPY_BYTES` each.
    """

    def __init__(self, backend: Backend, num_bytes: int, num_pages: int) -> None:
        self.backend, self._num = backend, num_bytes // MAX_COPY_BYTES
        window_bytes = num_pages * MAX_COPY_BYTES
        self._num_pages = num_pages
        self._host = HostBytes(window_bytes, MAX_COPY_BYTES)
        self._host.touch(threading.Event())
        self._host.pin(backend, threading.Event())
        self._address = backend.reserve(window_bytes)
        for page in range(num_pages):
            backend.map(self._address + page * MAX_COPY_BYTES, backend.create(MAX_COPY_BYTES))

    def do(self, bound_bytes: int | None) -> float:
        """Copy everything and return how many seconds that took.

        Args:
            bound_bytes: How far the driver is told of copies ahead of what is done; None: of all.
        """
        backend, begin, marks = self.backend, time.perf_counter(), deque[Any]()
        for number in range(self._num):
            place = number % self._num_pages * MAX_COPY_BYTES
            backend.copy_in(self._address + place, self._host.address + place, MAX_COPY_BYTES)
            if bound_bytes is None:
                continue
            marks.append(backend.mark_copies())
            if len(marks) * MAX_COPY_BYTES >= bound_bytes:
                marks.popleft().wait()
        backend.finish_copies()
        for mark in marks:
            mark.close()
        return time.perf_counter() - begin


class Small:
    """A thread that does something small again and again, and how long that took each time.

    Args:
        verb: Does it, and returns when that is done.
    """

    def __init__(self, verb: Callable[[], None]) -> None:
        self._verb, self._stop = verb, threading.Event()
        self.seconds: list[float] = []
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        """Begin."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(PAUSE_SECONDS):
            begin = time.perf_counter()
            self._verb()
            self.seconds.append(time.perf_counter() - begin)


Verbs = dict[str, Callable[[], None]]


def on_gpu() -> tuple[Backend, Verbs, list[Any]]:
    """Return the device's memory, what a step does there, and what keeps what that allocated."""
    import torch

    from kvcached_core.memory.vmm.cuda import CudaBackend

    host = torch.zeros(SMALL_BYTES, dtype=torch.uint8, pin_memory=True)
    device = torch.zeros(SMALL_BYTES, dtype=torch.uint8, device="cuda")
    stream, kept = torch.cuda.Stream(), list[Any]()

    def copy() -> None:
        with torch.cuda.stream(stream):
            device.copy_(host, non_blocking=True)
        stream.synchronize()

    def launch() -> None:
        with torch.cuda.stream(stream):
            device.add_(1)
        stream.synchronize()

    def allocate() -> None:
        kept.append(torch.empty(ALLOCATED_BYTES, dtype=torch.uint8, device="cuda"))

    def pin() -> None:
        kept.append(torch.empty(ALLOCATED_BYTES, dtype=torch.uint8, pin_memory=True))

    verbs = {"copy": copy, "launch": launch, "allocate": allocate, "pin": pin}
    return CudaBackend(), verbs, kept


def on_host() -> tuple[Backend, Verbs, list[Any]]:
    """Return the host's memory, and something that takes a moment."""
    return HostBackend(), {"copy": lambda: time.sleep(0.001)}, []


def measure(copies: Copies, verbs: Verbs, kept: list[Any], record: Record, num: int) -> None:
    """Copy everything in each way, alone and beside each verb; record what was found so far."""
    found: dict[str, Any] = {}
    for bound in (None, *BOUNDS):
        found[AT_ONCE if bound is None else format_bytes(bound)] = row = {
            "alone_seconds": [copies.do(bound) for _ in range(num)]
        }
        for name, verb in verbs.items():
            beside, small = list[float](), list[float]()
            for _ in range(num):
                with Small(verb) as thread:
                    beside.append(copies.do(bound))
                small += thread.seconds
                kept.clear()
                release_cached_blocks()
            row |= {f"beside_{name}_seconds": beside, f"{name}_seconds": small}
            record.add(ways=found)


def table(results: dict[str, Any]) -> str:
    """Return the figures as text."""
    lines = []
    for way, row in results["ways"].items():
        lines.append(
            f"{way}: all copied alone after {statistics.median(row['alone_seconds']):.4f} s"
        )
        for name in results["verbs"]:
            small = row[f"{name}_seconds"] or [float("nan")]
            lines.append(
                f"  beside {name:9} {statistics.median(row[f'beside_{name}_seconds']):.4f} s; "
                f"{name} {1e3 * statistics.median(small):.3f} ms, up to {1e3 * max(small):.3f} "
                f"(n {len(small)})"
            )
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    arguments = command_line(__doc__, can_rehearse=True)
    arguments.add_argument("--number", type=int, default=5, help="how often, of each way")
    options = arguments.parse_args()
    record = begin_record(options)
    backend, verbs, kept = on_host() if options.tiny else on_gpu()
    num_bytes = 256 * MIB if options.tiny else 15 * GIB
    copies = Copies(backend, num_bytes, TINY_WINDOW_PAGES if options.tiny else WINDOW_PAGES)
    record.add(num_bytes=num_bytes, small_bytes=SMALL_BYTES, verbs=list(verbs))
    measure(copies, verbs, kept, record, options.number)
    print(table(record.results))


if __name__ == "__main__":
    main()
