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

from parts.vllm_servers import (
    PREEMPTIONS,
    QUIET_SECONDS,
    READY_SECONDS,
    Record,
    Setting,
    bench_run,
    parser,
)

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
            running = self._server.metric("vllm:num_requests_running")
            self.peaks["running"] = max(self.peaks["running"], running)
            if self._elastic:
                view = self._setting.servers.view(self._server.name)
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
    before = server.metric(PREEMPTIONS)
    num_in, num_out = request_tokens(setting)
    with Watch(setting, server, elastic=elastic) as watch:
        figures = setting.bench(server, num_in, num_out, "inf", num, seed=3)
    result = figures | watch.peaks | {"requests": num}
    result["preemptions"] = server.metric(PREEMPTIONS) - before
    shown = ("requests", "completed", "failed", "running", "preemptions", "resident_bytes")
    print(
        f"burst on {server.name}: " + ", ".join(f"{k} {result[k]:.0f}" for k in shown), flush=True
    )
    return result


def neighbours(setting: Setting, record: Record, num_starts: int) -> None:
    """Start servers beside one that serves, and send bursts to two of them in turn."""
    servers = setting.servers
    first = setting.start("first", elastic=True)
    record.add(first_ready_seconds=servers.wait_ready("first", seconds=READY_SECONDS)["first"])
    names = ["second", "third"][:num_starts]
    with load(setting, first, "8") as under_load:
        for name in names:
            setting.start(name, elastic=True)
        beside = servers.wait_ready(*names, seconds=READY_SECONDS)
    virtual = {row.name: row.virtual_bytes for row in servers.device().instances}
    record.add(ready_seconds_beside=beside, load_meanwhile=under_load, virtual_bytes=virtual)
    print(f"started beside: {beside}, {under_load}", flush=True)
    for name in names[1:]:
        servers[name].kill()
    time.sleep(QUIET_SECONDS)
    device = servers.device()
    space = device.free_bytes + sum(row.resident_bytes for row in device.instances)
    num_tokens = BURST_SHARE * space / setting.kv_bytes_per_token
    num = max(int(num_tokens / sum(request_tokens(setting))), 1)
    record.add(kv_space_bytes=space)
    for name in ["first", *names[:1]]:
        record.add(**{f"burst_{name}": burst(setting, servers[name], num, elastic=True)})
        time.sleep(QUIET_SECONDS)
    servers.kill()
    half = setting.start("half", elastic=False, kv_bytes=space // 2)
    servers.wait_ready("half", seconds=READY_SECONDS)
    record.add(burst_vanilla_half=burst(setting, half, num, elastic=False))


def request_tokens(setting: Setting) -> tuple[int, int]:
    """Return the tokens that one request of a burst brings and gets."""
    return (100, 16) if setting.tiny else (1913, 162)


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
