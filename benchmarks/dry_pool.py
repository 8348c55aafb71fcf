"""A pool that is always too small: real vLLM servers that all want more than there is.

    python benchmarks/dry_pool.py --seconds 600 --json benchmarks/results/dry_pool.json

    python benchmarks/dry_pool.py --gpu --seconds 300 --json benchmarks/results/dry_pool_gpu.json

Each of three servers is sent bursts of 70 % of the pool, one after the other.
Halfway one is killed with SIGKILL and started again. Counted are requests that failed or hung.
"""

import asyncio
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parts.profiles import Profile, gpu, host, parser
from parts.record import shown, write

from kvcached_core.units import GIB, MIB
from kvcached_demo.harness.engines import VLLM
from kvcached_demo.harness.load import Completion, make_burst
from kvcached_demo.harness.memory import Recorder
from kvcached_demo.harness.server import EngineServer, ServerError
from kvcached_demo.harness.servers import Servers

NAMES = ("first", "second", "third")
VICTIM = NAMES[0]
NUM_OUTPUT_TOKENS = 32
SHARE = 0.7
HUNG_SECONDS = 240.0


@dataclass
class Outcome:
    """What one server's bursts came to."""

    num_completed: int = 0
    num_lost_with_victim: int = 0
    errors: list[str] = field(default_factory=list)
    longest_burst_seconds: float = 0.0
    wrong_lengths: int = 0


class DryPool:
    """Three servers, one pool, and what became of their requests."""

    def __init__(self, profile: Profile, servers: Servers, seconds: float) -> None:
        self.profile = profile
        self.servers = servers
        self.seconds = seconds
        self.outcomes = {name: Outcome() for name in NAMES}
        self.victim: EngineServer | None = None
        self.facts: dict[str, Any] = {}

    def start(self, name: str) -> EngineServer:
        """Start a server; the second one has no prefix cache."""
        (caching,) = VLLM.caching(is_on=name != NAMES[1])
        return self.profile.start(self.servers, name, caching, KVCACHED_DEBUG="1")

    async def run(self) -> None:
        """Send bursts to all of them until the time is up."""
        end = time.monotonic() + self.seconds
        loads = [asyncio.create_task(self._load(name, end)) for name in NAMES]
        await asyncio.sleep(self.seconds / 2)
        await asyncio.to_thread(self._kill_and_restart)
        await asyncio.gather(*loads)

    async def _load(self, name: str, end: float) -> None:
        outcome = self.outcomes[name]
        seed = NAMES.index(name)
        num_prompt_tokens = self.profile.num_prompt_tokens // 2
        num_bytes = (num_prompt_tokens + NUM_OUTPUT_TOKENS) * self.profile.kv_bytes_per_token
        while time.monotonic() < end:
            seed += len(NAMES)
            server = self.servers[name]
            burst = make_burst(
                num_requests=int(self.profile.pool_bytes * SHARE / num_bytes),
                num_prompt_tokens=num_prompt_tokens,
                num_output_tokens=NUM_OUTPUT_TOKENS,
                seed=seed,
            )
            start = time.monotonic()
            answers = await asyncio.wait_for(server.send(burst), HUNG_SECONDS)
            self._count(outcome, answers, is_victim=server is self.victim)
            seconds = time.monotonic() - start
            outcome.longest_burst_seconds = max(outcome.longest_burst_seconds, seconds)
            await asyncio.to_thread(self._wait_ready, name)

    def _wait_ready(self, name: str) -> None:
        while True:
            server = self.servers[name]
            try:
                server.wait_ready()
            except ServerError:
                if server is not self.victim:
                    raise
                time.sleep(0.1)  # killed, and not started again yet
            else:
                return

    @staticmethod
    def _count(outcome: Outcome, answers: list[Completion], *, is_victim: bool) -> None:
        for answer in answers:
            if answer.error is None:
                outcome.num_completed += 1
                outcome.wrong_lengths += len(answer.token_ids) != NUM_OUTPUT_TOKENS
            elif is_victim:
                outcome.num_lost_with_victim += 1
            else:
                outcome.errors.append(answer.error)

    def _kill_and_restart(self) -> None:
        held = self.servers.resident_bytes(VICTIM)
        self.victim = self.servers[VICTIM]  # before the kill: who waits for it asks
        self.victim.kill()
        start = time.monotonic()
        while self.servers.resident_bytes(VICTIM):
            time.sleep(0.005)
        self.facts["killed_holding_bytes"] = held
        self.facts["its_bytes_free_after_seconds"] = time.monotonic() - start
        self.start(VICTIM)


def main() -> None:
    """Run, print, write JSON; fail if a request was lost."""
    made = parser(__doc__)
    made.add_argument("--seconds", type=float, default=600.0)
    made.add_argument("--pool-gib", type=int, default=80, help="about what a GPU has for KV caches")
    options = made.parse_args()
    profile = gpu(options.pool_gib * GIB) if options.gpu else host(512 * MIB)
    with tempfile.TemporaryDirectory(prefix="kv-") as folder:
        with profile.servers(Path(folder)) as servers:
            pool = DryPool(profile, servers, options.seconds)
            for name in NAMES:
                pool.start(name)
            servers.wait_ready()
            with Recorder(servers.open_ledger) as recorder:
                asyncio.run(pool.run())
            servers.stop()
        left = sorted(path.name for path in servers.directory.iterdir())
    views = recorder.recording.views
    results = {
        "machine": profile.describe(),
        "seconds": options.seconds,
        "servers": {name: vars(outcome) for name, outcome in pool.outcomes.items()},
        "least_free_bytes": min(view.free_bytes for view in views),
        "share_of_time_below_a_page_free": sum(view.free_bytes < 16 * MIB for view in views)
        / len(views),
        "files_left_after_the_last_stopped": left,
    } | pool.facts
    write(options.json, results)
    print(shown(results))
    if any(outcome.errors for outcome in pool.outcomes.values()):
        raise SystemExit("requests were lost")


if __name__ == "__main__":
    main()
