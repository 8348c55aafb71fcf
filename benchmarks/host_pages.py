"""What it costs to take pages of shared host memory, to pass them on and to give them back.

    python benchmarks/host_pages.py --json benchmarks/results/host_pages.json
    python benchmarks/host_pages.py --gpu --json benchmarks/results/gpu/host_pages.json

A host tier whose pages come and go between servers would do these things (docs/adr/0019). Beside
them: files on the same memory, which vLLM's own tier on disk writes and reads. With `--gpu` the
pages are registered with CUDA, too, and short kernels are launched meanwhile.
"""

import argparse
import ctypes
import mmap
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from parts.machine import describe_gpu, describe_machine
from parts.ordered import value_at
from parts.record import Record

from kvcached_core.units import MIB

PAGE_BYTES = 64 * MIB
FILE_BYTES = 2 * MIB  # a chunk of 16 tokens of Llama-3.1-8B
POPULATE_READ, POPULATE_WRITE = 22, 23
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  its files are the subject
NUM_LAUNCHES = 2000

_libc = ctypes.CDLL(None, use_errno=True)


class Page:
    """A page of a file in shared memory, mapped or not."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("kvcached-page")
        os.ftruncate(self.fd, PAGE_BYTES)
        self.memory = mmap.mmap(self.fd, PAGE_BYTES)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))

    def touch(self, pool: ThreadPoolExecutor, num_threads: int) -> None:
        """Have all of it there, by so many threads."""
        part = PAGE_BYTES // num_threads
        list(
            pool.map(
                lambda n: advise(self.address + n * part, part, POPULATE_WRITE), range(num_threads)
            )
        )

    def map_again(self) -> None:
        """Map what is there in another place, as another process does, with all of its entries."""
        again = mmap.mmap(self.fd, PAGE_BYTES)
        again.madvise(POPULATE_READ)
        again.close()

    def remove(self) -> None:
        """Give the memory back and keep the mapping."""
        self.memory.madvise(mmap.MADV_REMOVE)

    def write(self) -> None:
        """Write over all of it, as copies to it do."""
        ctypes.memset(self.address, 1, PAGE_BYTES)


def advise(address: int, num_bytes: int, advice: int) -> None:
    """Call madvise, without the interpreter's lock."""
    if _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), advice):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def checked(result: Any) -> None:
    """Raise if CUDA's runtime refused."""
    if int(result):
        raise OSError(f"CUDA error {int(result)}")


def timed(act: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Return what a call took, in ms."""
    started = clock()
    act()
    return (clock() - started) * 1e3


class Times:
    """Times of acts by their names, in ms: on the clock, and of all cores."""

    def __init__(self) -> None:
        self.wall: dict[str, list[float]] = {}
        self.cores: dict[str, list[float]] = {}

    def take(self, name: str, act: Callable[[], object]) -> None:
        """Time one act."""
        cores: list[float] = []
        wall = timed(lambda: cores.append(timed(act, time.process_time)))
        self.wall.setdefault(name, []).append(wall)
        self.cores.setdefault(name, []).extend(cores)

    def summary(self) -> dict[str, Any]:
        """Return medians and ranges, and what a second of it comes to; print them."""
        made: dict[str, Any] = {}
        for name, all_ms in self.wall.items():
            cores_ms = self.cores[name]
            made[name] = {
                "wall_ms": all_ms,
                "cores_ms": cores_ms,
                "gb_per_second": PAGE_BYTES / statistics.median(all_ms) / 1e6,
                "gb_per_core_second": PAGE_BYTES / statistics.median(cores_ms) / 1e6,
            }
            print(
                f"{name}: {statistics.median(all_ms):.2f} ms ({min(all_ms):.2f} to "
                f"{max(all_ms):.2f}), {statistics.median(cores_ms):.2f} ms of all cores"
            )
        return made


def measure_pages(rounds: int, num_cores: int) -> dict[str, Any]:
    """Time each act on a page."""
    page, times = Page(), Times()
    with ThreadPoolExecutor(num_cores) as pool:
        for _ in range(rounds):
            for number in sorted({1, 2, num_cores}):
                times.take(f"touch_{number}", partial(page.touch, pool, number))
                times.take("write", page.write)
                times.take("map_again", page.map_again)
                times.take("remove", page.remove)
    return times.summary()


def measure_files(rounds: int) -> dict[str, Any]:
    """Time a page's worth of chunks, written as files and read."""
    folder = SHARED_MEMORY / f"kvcached-pages-{os.getpid()}"
    folder.mkdir()
    data, room = memoryview(os.urandom(FILE_BYTES)), bytearray(FILE_BYTES)
    paths = [folder / str(number) for number in range(PAGE_BYTES // FILE_BYTES)]

    def read(path: Path) -> None:
        with path.open("rb", buffering=0) as file:
            file.readinto(room)

    times = Times()
    try:
        for _ in range(rounds):
            times.take("files_write", lambda: [path.write_bytes(data) for path in paths])
            times.take("files_read", lambda: [read(path) for path in paths])
            times.take("files_remove", lambda: [path.unlink() for path in paths])
    finally:
        for path in paths:
            path.unlink(missing_ok=True)
        folder.rmdir()
    return times.summary()


def measure_gpu(rounds: int) -> dict[str, Any]:
    """Time registering a page with CUDA, and launches beside that."""
    import torch

    cudart: Any = torch.cuda.cudart()
    page, times = Page(), Times()
    page.write()
    number = torch.zeros(1, device="cuda")

    def register_and_back() -> None:
        times.take(
            "register", lambda: checked(cudart.cudaHostRegister(page.address, PAGE_BYTES, 0))
        )
        times.take("unregister", lambda: checked(cudart.cudaHostUnregister(page.address)))

    def launch() -> float:
        return timed(lambda: number.add_(1))

    alone = [launch() for _ in range(2 * NUM_LAUNCHES)][NUM_LAUNCHES:]
    beside: list[float] = []
    with ThreadPoolExecutor(1) as pool:
        for _ in range(rounds):
            registered = pool.submit(register_and_back)
            while not registered.done():
                beside.append(launch())
            registered.result()
    torch.cuda.synchronize()
    launches = {"alone": quantiles(alone), "beside": quantiles(beside)}
    print(f"launches, ms: {launches}")
    return times.summary() | {"launch_ms": launches}


def quantiles(values: list[float]) -> dict[str, float]:
    """Return the median, what 99 % are below, the largest, and the number."""
    return {
        "median": statistics.median(values),
        "p99": value_at(99, values),
        "most": max(values),
        "number": len(values),
    }


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    record = Record(options.json)
    record.add(machine=describe_gpu() if options.gpu else describe_machine(), page_bytes=PAGE_BYTES)
    cores = len(os.sched_getaffinity(0))
    record.add(pages=measure_pages(options.rounds, min(cores, 8)))
    record.add(files=measure_files(options.rounds))
    if options.gpu:
        record.add(cuda=measure_gpu(options.rounds))


if __name__ == "__main__":
    main()
