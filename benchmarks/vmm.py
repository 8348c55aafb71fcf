"""What the driver's virtual memory costs: by handle size, idle and under kernels, and by our arena.

    python benchmarks/vmm.py --json benchmarks/results/vmm.json

Needs a CUDA device with 70 GiB free. Writes a plot beside the JSON.
"""

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from parts.machine import describe_gpu
from parts.record import command_line, write

from kvcached_core.memory.arena import Arena
from kvcached_core.memory.geometry import choose_geometry
from kvcached_core.memory.vmm.cuda import CudaBackend
from kvcached_core.units import GIB, MIB
from kvcached_demo.harness.background import Background

HANDLE_MIB = (2, 16, 64, 256)
VERBS = ("create", "map", "unmap", "release")
NUM_HANDLES = 64
LLAMA_8B = {"block_bytes": 64 * 1024, "num_planes": 32}


def time_handles(backend: CudaBackend, size: int) -> dict[str, float]:
    """Return the median microseconds of each verb for handles of `size` bytes."""
    times: dict[str, list[float]] = {verb: [] for verb in VERBS}
    address = backend.reserve(NUM_HANDLES * size)
    handles = []

    def timed(verb: str, *args: Any) -> Any:
        start = time.perf_counter()
        result = getattr(backend, verb)(*args)
        times[verb].append(time.perf_counter() - start)
        return result

    for index in range(NUM_HANDLES):
        handle = timed("create", size)
        timed("map", address + index * size, handle)
        handles.append(handle)
    backend.synchronize()
    for index, handle in enumerate(handles):
        timed("unmap", address + index * size, handle)
        timed("release", handle)
    backend.free(address, NUM_HANDLES * size)
    return {verb: statistics.median(values) * 1e6 for verb, values in times.items()}


class KernelLoad(Background):
    """Matrix products in a thread, as many as the device takes; counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.num_products = 0

    def _run(self) -> None:
        a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
        while not self._end.is_set():
            for _ in range(16):
                a @ a
            torch.cuda.synchronize()
            self.num_products += 16


def product_rate(load: KernelLoad, action: Any) -> float:
    """Return matrix products per second while `action` runs."""
    before, start = load.num_products, time.perf_counter()
    action()
    return (load.num_products - before) / (time.perf_counter() - start)


class MapLoad(Background):
    """Maps and unmaps pages in a thread, `pages_per_second` of them or as many as it can."""

    def __init__(self, backend: CudaBackend, pages_per_second: int | None) -> None:
        super().__init__()
        self.num_pages = 0
        self._backend = backend
        self._pause_seconds = 1 / pages_per_second if pages_per_second else 0.0

    def _run(self) -> None:
        backend, size = self._backend, 16 * MIB
        address = backend.reserve(size)
        while not self._end.wait(self._pause_seconds):
            handle = backend.create(size)
            backend.map(address, handle)
            backend.zero(address, size)
            backend.synchronize()
            backend.unmap(address, handle)
            backend.release(handle)
            self.num_pages += 1
        backend.free(address, size)


def time_launches(seconds: float = 1.0) -> dict[str, float]:
    """Return what giving the device a small kernel takes in this thread, in microseconds."""
    small = torch.zeros(1024, device="cuda")
    times = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for _ in range(200):
            start = time.perf_counter()
            small.add_(1)
            times.append(time.perf_counter() - start)
        torch.cuda.synchronize()
    cuts = statistics.quantiles(times, n=1000)
    named = {"mean": statistics.mean(times), "p50": cuts[499], "p99": cuts[989], "p99.9": cuts[998]}
    return {name: value * 1e6 for name, value in named.items()}


def time_launches_beside(backend: CudaBackend) -> dict[str, dict[str, float]]:
    """Return what launches take alone and while another thread maps and unmaps."""
    time_launches()
    found = {"alone": time_launches()}
    for pages_per_second in (100, 1000, None):
        with MapLoad(backend, pages_per_second) as load:
            found[f"beside {pages_per_second or 'all it can'}"] = time_launches()
        found[f"beside {pages_per_second or 'all it can'}"]["pages"] = load.num_pages
    return found


def time_arena(page_mib: int, total_bytes: int = 64 * GIB) -> dict[str, Any]:
    """Map and unmap `total_bytes` through our own arena, three times."""
    backend = CudaBackend()
    geometry = choose_geometry(
        **LLAMA_8B,
        granularity_bytes=backend.granularity_bytes,
        target_page_bytes=page_mib * MIB,
    )
    num_pages = total_bytes // geometry.page_bytes
    arena = Arena(backend, geometry, num_pages)
    map_seconds, ready_seconds, unmap_seconds = [], [], []
    for _ in range(3):
        start = time.perf_counter()
        arena.map(range(num_pages))
        mapped = time.perf_counter()
        backend.synchronize()
        ready = time.perf_counter()
        arena.unmap(range(num_pages))
        unmap_seconds.append(time.perf_counter() - ready)
        map_seconds.append(mapped - start)
        ready_seconds.append(ready - start)
    arena.close()
    return {
        "page_bytes": geometry.page_bytes,
        "num_pages": num_pages,
        "map_seconds": statistics.median(map_seconds),
        "zeroed_seconds": statistics.median(ready_seconds),
        "unmap_seconds": statistics.median(unmap_seconds),
    }


def fresh_memory_is_zero(backend: CudaBackend) -> bool:
    """Return whether 8 GiB of our own dirty memory, released and created again, read as zeros."""
    size, count = 64 * MIB, 128
    driver = backend._driver  # noqa: SLF001  what the backend zeroes must be seen before it does
    address = backend.reserve(count * size)
    is_zero = True
    for is_first in (True, False):
        handles = [backend.create(size) for _ in range(count)]
        for index, handle in enumerate(handles):
            at = address + index * size
            driver.call("cuMemMap", at, size, 0, handle.value, 0)
            driver.call("cuMemSetAccess", at, size, backend._access, 1)  # noqa: SLF001
        tensor = backend.tensor(address, count * size)
        if is_first:
            tensor.fill_(-1)
        else:
            is_zero = not bool(tensor.any())
        torch.cuda.synchronize()
        del tensor
        for index, handle in enumerate(handles):
            driver.call("cuMemUnmap", address + index * size, size)
            backend.release(handle)
    backend.free(address, count * size)
    return is_zero


def time_nvml() -> float:
    """Return the microseconds of asking NVML for the free memory."""
    from kvcached_core.ledger.nvml import free_memory_reader
    from kvcached_core.memory.devices import cuda_device

    properties = torch.cuda.get_device_properties(0)
    read = free_memory_reader(cuda_device(str(properties.uuid), properties.total_memory).name)
    times = []
    for _ in range(200):
        start = time.perf_counter()
        read()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw the cost of each verb by handle size."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    bottom = [0.0] * len(HANDLE_MIB)
    names = [f"{size} MiB" for size in HANDLE_MIB]
    for verb in VERBS:
        values = [results["idle"][str(size)][verb] for size in HANDLE_MIB]
        axes.bar(names, values, bottom=bottom, label=verb)
        bottom = [low + value for low, value in zip(bottom, values, strict=True)]
    axes.set_ylabel("microseconds per handle")
    axes.set_title(f"Driver cost by handle size, {results['machine']['gpu']}")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Measure, print a table, write JSON and plot."""
    arguments = command_line(__doc__)
    path = arguments.parse_args().json
    torch.zeros(1, device="cuda")
    backend = CudaBackend()
    for size in HANDLE_MIB:
        time_handles(backend, size * MIB)
    results: dict[str, Any] = {"machine": describe_gpu(), "nvml_microseconds": time_nvml()}
    results["idle"] = {str(size): time_handles(backend, size * MIB) for size in HANDLE_MIB}
    with KernelLoad() as load:
        time.sleep(0.5)
        alone = product_rate(load, lambda: time.sleep(0.5))

        def work() -> None:
            for _ in range(50):
                time_handles(backend, 16 * MIB)

        beside = product_rate(load, work)
        results["under_kernels"] = {
            str(size): time_handles(backend, size * MIB) for size in HANDLE_MIB
        }
    results["kernel_rate_beside_mapping"] = beside / alone
    results["launches"] = time_launches_beside(backend)
    results["fresh_memory_is_zero"] = fresh_memory_is_zero(backend)
    results["arena"] = [time_arena(page_mib) for page_mib in (16, 64)]
    write(path, results)
    plot(results, path.with_suffix(".png"))
    for when in ("idle", "under_kernels"):
        for size, costs in results[when].items():
            line = "  ".join(f"{verb} {value:6.1f}" for verb, value in costs.items())
            print(f"{when:14} {size:>4} MiB  {line} us")
    for arena in results["arena"]:
        print(
            f"64 GiB in pages of {arena['page_bytes'] // MIB} MiB: mapped in "
            f"{arena['map_seconds'] * 1e3:.0f} ms, zeroed after "
            f"{arena['zeroed_seconds'] * 1e3:.0f} ms, unmapped in "
            f"{arena['unmap_seconds'] * 1e3:.0f} ms"
        )
    for when, costs in results["launches"].items():
        shown = "  ".join(f"{name} {value:.1f}" for name, value in costs.items())
        print(f"launch {when:18} {shown} us")
    print(f"fresh memory is zero: {results['fresh_memory_is_zero']}")
    print(f"NVML free memory: {results['nvml_microseconds']:.0f} us")
    print(f"kernel rate beside mapping: {results['kernel_rate_beside_mapping']:.3f}")


if __name__ == "__main__":
    main()
