"""How soon an idle engine gives: one real vLLM server whose prefix cache is full.

    python benchmarks/pressure.py --json benchmarks/results/pressure.json
    python benchmarks/pressure.py --gpu --json benchmarks/results/pressure_gpu.json

A neighbour, here a row of this process, asks for memory; later the server's limit is lowered.
Nobody sends the server a request meanwhile.
"""

import asyncio
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from parts.neighbour import Neighbour
from parts.profiles import Profile, gpu, host, parser
from parts.record import write

from kvcached_core import control
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.view import InstanceView
from kvcached_core.units import GIB, MIB
from kvcached_demo.harness.engines import VLLM
from kvcached_demo.harness.load import make_burst
from kvcached_demo.harness.server import EngineServer
from kvcached_demo.harness.servers import Servers

NUM_ASKS = 5


@dataclass(frozen=True)
class Sizes:
    """How much is cached, asked for at a time, and left by two lowered limits, in bytes."""

    cache_bytes: int
    asked_bytes: int
    limits_bytes: tuple[int, ...]


HOST = Sizes(4 * GIB, 256 * MIB, (GIB,))
GPU = Sizes(60 * GIB, 8 * GIB, (4 * GIB, 5 * GIB // 4))


def fill(server: EngineServer, profile: Profile, seed: int, num_bytes: int) -> None:
    """Send prompts that leave `num_bytes` in the server's prefix cache."""
    burst = make_burst(
        num_requests=num_bytes // (profile.num_prompt_tokens * profile.kv_bytes_per_token),
        num_prompt_tokens=profile.num_prompt_tokens,
        num_output_tokens=1,
        seed=seed,
    )
    failed = [answer.error for answer in asyncio.run(server.send(burst))]
    if any(failed):
        raise RuntimeError(f"requests failed: {failed}")


def view(ledger: Ledger, name: str) -> InstanceView:
    """Return an instance as it is now."""
    return next(row for row in ledger.view().instances if row.name == name)


def measure(servers: Servers, profile: Profile, sizes: Sizes) -> dict[str, Any]:
    """Fill the cache, ask, lower the limit."""
    server = servers["cache"]
    fill(server, profile, 1, sizes.cache_bytes)
    with servers.open_ledger() as ledger:
        before = view(ledger, "cache")
        neighbour = Neighbour(ledger)
        free_bytes = max(ledger.free_bytes(neighbour.row), 0)
        ledger.promise(neighbour.row, free_bytes, before.page_bytes)
        takes = [neighbour.take(sizes.asked_bytes, before.page_bytes) for _ in range(NUM_ASKS)]
        neighbour.close()
        held = view(ledger, "cache").cached_bytes
        fill(server, profile, 2, sizes.cache_bytes - held)
        limits = [
            lower(ledger, limit_bytes, servers.directory) for limit_bytes in sizes.limits_bytes
        ]
    return {
        "cached_bytes": before.cached_bytes,
        "asked_bytes": sizes.asked_bytes,
        "first_page_ms": [first for first, _ in takes],
        "all_ms": [whole for _, whole in takes],
        "limits": limits,
    }


def lower(ledger: Ledger, limit_bytes: int, directory: Path) -> dict[str, Any]:
    """Lower the server's limit; return when it held."""
    held = view(ledger, "cache").resident_bytes
    start = time.perf_counter()
    answer = control.set_limit("cache", str(limit_bytes), directory=directory, wait_seconds=30.0)
    return {
        "before_bytes": held,
        "after_bytes": answer.after_bytes,
        "outcome": answer.outcome,
        "ms": (time.perf_counter() - start) * 1e3,
    }


def main() -> None:
    """Measure, print, write JSON."""
    made = parser(__doc__)
    made.add_argument("--cache-gib", type=int, help="how much is cached, on a GPU 60")
    options = made.parse_args()
    profile, sizes = (gpu(0), GPU) if options.gpu else (host(5 * GIB), HOST)
    if options.cache_gib:
        sizes = replace(sizes, cache_bytes=options.cache_gib * GIB)
    with (
        tempfile.TemporaryDirectory(prefix="kv-") as folder,
        profile.servers(Path(folder)) as servers,
    ):
        profile.start(servers, "cache", *VLLM.caching(is_on=True)).wait_ready()
        measured = measure(servers, profile, sizes)
        servers.stop()
    results = {"machine": profile.describe()} | measured
    write(options.json, results)
    asked = f"{sizes.asked_bytes // MIB} MiB of {results['cached_bytes'] / GIB:.1f} GiB cached"
    print(f"first page of {asked}: median {statistics.median(results['first_page_ms']):.1f} ms")
    print(f"all of {asked}: median {statistics.median(results['all_ms']):.1f} ms")
    print(f"limits lowered: {results['limits']}")


if __name__ == "__main__":
    main()
