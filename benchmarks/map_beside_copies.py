"""How long a driver takes to map memory, alone and beside copies of weights to the same device.

    python benchmarks/map_beside_copies.py --json benchmarks/results/gpu/map_beside_copies_h200.json

It maps 15 GiB in pages of 16 or 64 MiB: alone; in turn with the copy of each page, as a wake does;
in front of all copies, as one does with `KVCACHED_WEIGHTS_WAIT=layers`; and while copies to other
pages are under way. Copies go in pieces of 16 or 2 MiB. Access is set page by page, or for runs of
mapped pages at once, and they are unmapped in the same way. `--tiny` rehearses it on the host
backend, whose times say nothing.
"""

import statistics
import threading
import time
from dataclasses import dataclass
from typing import Any

from parts.record import Record, begin_record, command_line

from kvcached_core.memory.vmm.backend import Backend, Handle
from kvcached_core.memory.vmm.cuda import CudaBackend, CudaHandle
from kvcached_core.memory.vmm.host import HostBackend
from kvcached_core.units import GIB, MIB, format_bytes
from kvcached_core.weights.host_bytes import HostBytes

ALONE, IN_TURN, FIRST, BESIDE = "alone", "in turn", "first", "beside"
PAGES = (16 * MIB, 64 * MIB)
SMALL_PAGE = 2 * MIB  # mapped alone
PIECES = (16 * MIB, 2 * MIB)
RUNS = (8, 64)  # pages that get access, and are unmapped, by one call
WINDOW_PAGES = 4  # of the largest size, that copies come from, and go to beside


@dataclass(frozen=True)
class Way:
    """One way to map everything.

    Attributes:
        order: `ALONE`, `IN_TURN`, `FIRST` or `BESIDE`.
        page_bytes: The size of a page.
        piece_bytes: The size of a copy; 0 where nothing is copied.
        run_pages: How many pages get access, and are unmapped, at once.
    """

    order: str
    page_bytes: int
    piece_bytes: int = 0
    run_pages: int = 1

    def __str__(self) -> str:
        """Return what the record calls it."""
        copies = f", copies of {format_bytes(self.piece_bytes)}" if self.piece_bytes else ""
        runs = f", access for {self.run_pages}" if self.run_pages > 1 else ""
        return f"{self.order}, pages of {format_bytes(self.page_bytes)}{copies}{runs}"


def all_ways() -> list[Way]:
    """Return every way; copies into pages that are mapped need access page by page."""
    ways = [Way(ALONE, SMALL_PAGE), *(Way(ALONE, SMALL_PAGE, 0, run) for run in RUNS)]
    for page in PAGES:
        ways += [Way(ALONE, page), *(Way(ALONE, page, 0, run) for run in RUNS)]
        for piece in PIECES:
            ways += [Way(order, page, piece) for order in (IN_TURN, FIRST, BESIDE)]
        ways += [Way(BESIDE, page, PIECES[0], run) for run in RUNS]
    return ways


class Mapping:
    """Addresses of a device, and host memory whose bytes go there again and again.

    Args:
        backend: The device.
        num_bytes: What is mapped, and copied.
    """

    def __init__(self, backend: Backend, num_bytes: int) -> None:
        self.backend, self._num_bytes = backend, num_bytes
        self._driver, self._access = None, None
        if isinstance(backend, CudaBackend):  # which sets access for each page by itself
            self._driver, self._access = backend._driver, backend._access  # noqa: SLF001
        self._window_bytes = WINDOW_PAGES * max(PAGES)
        self._host = HostBytes(self._window_bytes, max(PAGES))
        self._host.touch(threading.Event())
        self._host.pin(backend, threading.Event())
        self._address = backend.reserve(num_bytes)
        self._beside = backend.reserve(self._window_bytes)
        for offset in range(0, self._window_bytes, max(PAGES)):
            backend.map(self._beside + offset, backend.create(max(PAGES)))

    def do(self, way: Way) -> dict[str, float]:
        """Map and copy everything, unmap it again, and return how many seconds the parts took."""
        backend, starts = self.backend, range(0, self._num_bytes, way.page_bytes)
        begin, map_seconds = time.perf_counter(), 0.0
        if way.order == BESIDE:
            self._copy(way, 0, self._num_bytes)
        handles: list[tuple[int, Handle]] = []
        for number, start in enumerate(starts, 1):
            handles.append((self._address + start, backend.create(way.page_bytes)))
            before = time.perf_counter()
            self._map(handles, way, is_last=number == len(starts))
            map_seconds += time.perf_counter() - before
            if way.order == IN_TURN:
                self._copy(way, start, way.page_bytes)
        mapped = time.perf_counter() - begin
        if way.order == FIRST:
            self._copy(way, 0, self._num_bytes)
        backend.finish_copies()
        copied = time.perf_counter() - begin
        found = {"map_seconds": map_seconds, "mapped_seconds": mapped, **self._drop(handles, way)}
        return found if way.order == ALONE else found | {"copied_seconds": copied}

    def _drop(self, handles: list[tuple[int, Handle]], way: Way) -> dict[str, float]:
        begin = time.perf_counter()
        if way.run_pages == 1 or self._driver is None:
            for address, handle in handles:
                self.backend.unmap(address, handle)
        else:
            for start in range(0, len(handles), way.run_pages):
                run = handles[start : start + way.run_pages]
                self._driver.call("cuMemUnmap", run[0][0], len(run) * way.page_bytes)
        unmapped = time.perf_counter()
        for _, handle in handles:
            self.backend.release(handle)
        released = time.perf_counter()
        return {"unmap_seconds": unmapped - begin, "release_seconds": released - unmapped}

    def _copy(self, way: Way, start: int, num_bytes: int) -> None:
        for offset in range(start, start + num_bytes, way.piece_bytes):
            place = offset % self._window_bytes
            to = self._beside + place if way.order == BESIDE else self._address + offset
            self.backend.copy_in(to, self._host.address + place, way.piece_bytes)

    def _map(self, handles: list[tuple[int, Handle]], way: Way, *, is_last: bool) -> None:
        """Map the last page; set access where a run ends."""
        address, handle = handles[-1]
        if way.run_pages == 1 or self._driver is None or not isinstance(handle, CudaHandle):
            self.backend.map(address, handle)
            return
        call, page_bytes = self._driver.call, way.page_bytes
        call("cuMemMap", address, page_bytes, 0, handle.value, 0)
        num_open = (len(handles) - 1) % way.run_pages + 1
        if is_last or num_open == way.run_pages:
            first = address - (num_open - 1) * page_bytes
            call("cuMemSetAccess", first, num_open * page_bytes, self._access, 1)


def measure(mapping: Mapping, record: Record, num: int) -> None:
    """Map in each way so many times, in turn; record what was found so far."""
    found: dict[str, dict[str, list[float]]] = {}
    for _ in range(num):
        for way in all_ways():
            for name, seconds in mapping.do(way).items():
                found.setdefault(str(way), {}).setdefault(name, []).append(seconds)
        record.add(ways=found)


def table(results: dict[str, Any]) -> str:
    """Return the figures as text: medians, in milliseconds."""
    lines = []
    for way, row in results["ways"].items():
        medians = [f"{name} {1e3 * statistics.median(each):.1f}" for name, each in row.items()]
        lines.append(f"{way:60} {', '.join(medians).replace('_seconds', '')}")
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    arguments = command_line(__doc__, can_rehearse=True)
    arguments.add_argument("--number", type=int, default=4, help="how often, in each way")
    options = arguments.parse_args()
    record = begin_record(options)
    if options.tiny:
        record.add(num_bytes=256 * MIB)
        backend: Backend = HostBackend()
    else:
        import torch

        torch.zeros(1, device="cuda")  # the context that an engine would have
        record.add(num_bytes=15 * GIB)
        backend = CudaBackend()
    measure(Mapping(backend, record.results["num_bytes"]), record, options.number)
    print(table(record.results))


if __name__ == "__main__":
    main()
