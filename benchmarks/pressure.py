"""How soon an idle engine gives: one real vLLM server on host memory whose prefix cache is full.

    python benchmarks/pressure.py --json benchmarks/results/pressure.json

A neighbour, here a row of this process, asks for memory; later the server's limit is lowered.
Nobody sends the server a request meanwhile.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from machine import describe_machine

from kvcached_core import control
from kvcached_core.cli.demo.load import make_burst, send
from kvcached_core.cli.demo.model import KV_BYTES_PER_TOKEN, make_model
from kvcached_core.cli.demo.server import EngineServer
from kvcached_core.ledger import Ledger, doorbell_path
from kvcached_core.ledger_view import InstanceView
from kvcached_core.pressure import Doorbell, ask_peers
from kvcached_core.units import GIB, MIB

POOL = 5 * GIB
CACHE_BYTES = 4 * GIB
PROMPT_TOKENS = 1900
NUM_ASKS = 5
ASKED_BYTES = 256 * MIB
SETTINGS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}


def fill(server: EngineServer, seed: int, num_bytes: int) -> None:
    """Send prompts that leave `num_bytes` in the server's prefix cache."""
    burst = make_burst(
        num_requests=num_bytes // (PROMPT_TOKENS * KV_BYTES_PER_TOKEN),
        num_prompt_tokens=PROMPT_TOKENS,
        num_output_tokens=1,
        seed=seed,
    )
    failed = [answer.error for answer in asyncio.run(send(server.url, "cache", burst))]
    if any(failed):
        raise RuntimeError(f"requests failed: {failed}")


def view(ledger: Ledger, name: str) -> InstanceView:
    """Return an instance as it is now."""
    return next(row for row in ledger.view().instances if row.name == name)


class Neighbour:
    """An instance of this process that wants memory."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.row = ledger.register(name="neighbour", engine="benchmark")
        self.rang = threading.Event()
        self.bell = Doorbell(doorbell_path(ledger.path, self.row), self.rang.set)

    def take(self, num_bytes: int, page_bytes: int) -> tuple[float, float]:
        """Take `num_bytes`; return after how many ms the first page came, and all of it."""
        granted, first_ms = 0, 0.0
        start = time.perf_counter()
        while granted < num_bytes:
            self.rang.clear()
            more = self.ledger.reserve(self.row, num_bytes - granted, page_bytes)
            granted += more
            if more and not first_ms:
                first_ms = (time.perf_counter() - start) * 1e3
            if granted < num_bytes:
                ask_peers(self.ledger, self.row, num_bytes - granted)
                self.rang.wait(1.0)
        return first_ms, (time.perf_counter() - start) * 1e3

    def close(self) -> None:
        """Leave the ledger."""
        self.bell.close()
        self.ledger.unregister(self.row)


def measure(server: EngineServer, directory: Path) -> dict[str, Any]:
    """Fill the cache, ask, lower the limit."""
    fill(server, 1, CACHE_BYTES)
    with Ledger(directory / "host.ledger") as ledger:
        before = view(ledger, "cache")
        neighbour = Neighbour(ledger)
        free_bytes = max(ledger.free_bytes(neighbour.row), 0)
        ledger.reserve(neighbour.row, free_bytes, before.page_bytes)
        takes = [neighbour.take(ASKED_BYTES, before.page_bytes) for _ in range(NUM_ASKS)]
        neighbour.close()
        held = view(ledger, "cache").cached_bytes
        fill(server, 2, CACHE_BYTES - held)
        held = view(ledger, "cache").resident_bytes
        start = time.perf_counter()
        answer = control.set_limit("cache", str(GIB), directory=directory)
        limit_ms = (time.perf_counter() - start) * 1e3
    return {
        "cached_bytes": before.cached_bytes,
        "asked_bytes": ASKED_BYTES,
        "first_page_ms": [first for first, _ in takes],
        "all_ms": [whole for _, whole in takes],
        "limit": {
            "before_bytes": held,
            "after_bytes": answer.after_bytes,
            "outcome": answer.outcome,
            "ms": limit_ms,
        },
    }


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    path = parser.parse_args().json
    with tempfile.TemporaryDirectory(prefix="kv-") as folder:
        workspace = Path(folder)
        directory = workspace / "kv"
        environ = SETTINGS | {
            "ENABLE_KVCACHED": "1",
            "KVCACHED_DIR": str(directory),
            "KVCACHED_HOST_POOL": str(POOL),
            "KVCACHED_NAME": "cache",
        }
        server = EngineServer(
            "cache",
            make_model(workspace / "model", seed=1),
            workspace,
            environ=environ,
            arguments=("--enable-prefix-caching", "--max-num-seqs", "16"),
        )
        try:
            server.wait_ready()
            results = {"machine": describe_machine()} | measure(server, directory)
        finally:
            server.stop()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n")
    asked = f"{ASKED_BYTES // MIB} MiB of {results['cached_bytes'] / GIB:.1f} GiB cached"
    print(f"first page of {asked}: median {statistics.median(results['first_page_ms']):.1f} ms")
    print(f"all of {asked}: median {statistics.median(results['all_ms']):.1f} ms")
    print(f"limit lowered: {results['limit']}")


if __name__ == "__main__":
    main()
