"""Several elastic servers on one GPU: starting under load, and bursts of 60 % of the KV space.

    python benchmarks/vllm_neighbours.py --json benchmarks/results/vllm_neighbours.json

Two servers start while a first one serves. Two of them then get a burst in turn, each of 60 % of
what is free for KV caches, and a vanilla server with half of that gets the same burst.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

from vllm_servers import (
    PREEMPTIONS,
    QUIET_SECONDS,
    Record,
    Setting,
    bench_run,
    metric,
    parser,
    wait_all,
)

from kvcached_core.ledger.ledger import Ledger
from kvcached_core.units import MIB
from kvcached_demo.harness.background import Background
from kvcached_demo.harness.server import EngineServer

BURST_SHARE = 0.6


class Watch(Background):
    """Samples how many requests a server runs, and what it holds."""

    def __init__(self, setting: Setting, server: EngineServer, *, elastic: bool) -> None:
        super().__init__()
        self.peaks = {"running": 0.0, "resident_bytes": 0.0}
        self._setting, self._server, self._elastic = setting, server, elastic

    def _run(self) -> None:
        while not self._end.wait(0.2):
            running = metric(self._server, "vllm:num_requests_running")
            self.peaks["running"] = max(self.peaks["running"], running)
            if self._elastic:
                view = self._setting.view(self._server.name)
                held = max(self.peaks["resident_bytes"], view.resident_bytes)
                self.peaks["resident_bytes"] = held


@contextlib.contextmanager
def load(setting: Setting, server: EngineServer, rate: str) -> Iterator[dict[str, Any]]:
    """Send requests at a rate while the block runs; what came of them is in the result then."""
    result: dict[str, Any] = {}
    stop = threading.Event()

    def run() -> None:
        completed = failed = 0
        while not stop.is_set():
            done = setting.bench(server, 256, 32, rate, 40, seed=7)
            completed, failed = completed + done["completed"], failed + done["failed"]
        result.update(completed=completed, failed=failed)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield result
    finally:
        stop.set()
        thread.join()


def burst(setting: Setting, server: EngineServer, num: int, *, elastic: bool) -> dict[str, Any]:
    """Send `num` requests at once and say how they fared."""
    before = metric(server, PREEMPTIONS)
    num_in, num_out = request_tokens(setting)
    with Watch(setting, server, elastic=elastic) as watch:
        figures = setting.bench(server, num_in, num_out, "inf", num, seed=3)
    result = figures | watch.peaks | {"requests": num}
    result["preemptions"] = metric(server, PREEMPTIONS) - before
    shown = ("requests", "completed", "failed", "running", "preemptions", "resident_bytes")
    print(
        f"burst on {server.name}: " + ", ".join(f"{k} {result[k]:.0f}" for k in shown), flush=True
    )
    return result


def neighbours(setting: Setting, record: Record, num_starts: int) -> None:
    """Start servers beside one that serves, and send bursts to two of them in turn."""
    first = setting.start("first", elastic=True)
    servers = [first]
    try:
        record.add(first_ready_seconds=wait_all([first])["first"])
        with load(setting, first, "8") as under_load:
            names = ["second", "third"][:num_starts]
            servers += [setting.start(name, elastic=True) for name in names]
            beside = wait_all(servers[1:])
        views = {server.name: setting.view(server.name) for server in servers}
        virtual = {name: view.virtual_bytes for name, view in views.items()}
        record.add(ready_seconds_beside=beside, load_meanwhile=under_load, virtual_bytes=virtual)
        print(f"started beside: {beside}, {under_load}", flush=True)
        for server in servers[2:]:
            server.kill()
        del servers[2:]
        time.sleep(QUIET_SECONDS)
        space = kv_space(setting, [server.name for server in servers])
        num = max(
            int(BURST_SHARE * space / setting.kv_bytes_per_token / sum(request_tokens(setting))), 1
        )
        record.add(kv_space_bytes=space)
        for server in servers:
            record.add(**{f"burst_{server.name}": burst(setting, server, num, elastic=True)})
            time.sleep(QUIET_SECONDS)
    finally:
        for server in servers:
            server.kill()
    half = setting.start("half", elastic=False, kv_bytes=space // 2)
    try:
        wait_all([half])
        record.add(burst_vanilla_half=burst(setting, half, num, elastic=False))
    finally:
        half.kill()


def request_tokens(setting: Setting) -> tuple[int, int]:
    """Return the tokens that one request of a burst brings and gets."""
    return (100, 16) if setting.tiny else (1913, 162)


def kv_space(setting: Setting, names: list[str]) -> int:
    """Return what is free for KV caches beside the engines' weights, in bytes."""
    held = sum(setting.view(name).resident_bytes for name in names)
    if setting.tiny:
        return 512 * MIB
    from kvcached_core.ledger.nvml import free_memory_reader

    (path,) = (setting.folder / "kv").glob("*.ledger")
    with Ledger(path) as ledger:
        headroom = int(ledger.capacity_bytes * 0.02 / 0.98)
    return free_memory_reader(path.stem)() + held - headroom


def main() -> None:
    """Measure, print, write JSON."""
    arguments = parser(__doc__)
    arguments.add_argument(
        "--starts", type=int, default=2, help="servers to start beside the first"
    )
    options = arguments.parse_args()
    with bench_run(options) as (setting, record):
        neighbours(setting, record, options.starts)


if __name__ == "__main__":
    main()
