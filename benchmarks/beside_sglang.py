"""One vLLM and one SGLang server on one GPU: bursts of 60 % of the KV space in turn, and kill -9.

    python benchmarks/beside_sglang.py --json benchmarks/results/beside_sglang.json

Each server is sent two bursts in turn, then both get one at once. Then SGLang is killed while
both serve, started again, and vLLM is killed.
"""

import asyncio
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from parts.machine import describe_gpu
from parts.profiles import Profile, gpu
from parts.record import command_line, write
from parts.sglang_servers import SGLangSetting

from kvcached_demo.harness.load import Burst, Completion, make_burst
from kvcached_demo.harness.memory import Recorder

SHARE = 0.6
NUM_IN, NUM_OUT = 1900, 100
VLLM, SGLANG = "vllm", "sglang"


class Beside:
    """Both servers, and what became of their requests."""

    def __init__(self, workspace: Path) -> None:
        self.profile: Profile = gpu(0)
        self.servers = self.profile.servers(workspace)
        self.setting = SGLangSetting(workspace, tiny=False, servers=self.servers)
        self.facts: dict[str, Any] = {}
        self.num_lost = 0

    def start(self, name: str) -> None:
        """Start a server of the kind that its name says."""
        if name == VLLM:
            self.profile.start(self.servers, name)
        else:
            self.setting.start(name, elastic=True)

    def burst(self, seed: int) -> Burst:
        """Return requests that need `SHARE` of what is there for KV caches."""
        view = self.servers.device()
        held = sum(row.resident_bytes for row in view.instances)
        self.facts["kv_space_bytes"] = view.free_bytes + held
        num_bytes = (NUM_IN + NUM_OUT) * self.profile.kv_bytes_per_token
        return make_burst(
            num_requests=int(SHARE * (view.free_bytes + held) / num_bytes),
            num_prompt_tokens=NUM_IN,
            num_output_tokens=NUM_OUT,
            seed=seed,
        )

    def send(self, label: str, *names: str) -> None:
        """Send a burst to each of these servers at once; keep what came back."""
        start = time.monotonic()
        answers = asyncio.run(self.servers.send({name: self.burst(len(label)) for name in names}))
        self.note(label, answers, time.monotonic() - start)

    def note(self, label: str, answers: dict[str, list[Completion]], seconds: float) -> None:
        """Count completed and failed requests."""
        found = {
            name: {
                "requests": len(of_name),
                "completed": sum(answer.error is None for answer in of_name),
                "errors": sorted({answer.error for answer in of_name if answer.error})[:3],
            }
            for name, of_name in answers.items()
        }
        self.num_lost += sum(of["requests"] - of["completed"] for of in found.values())
        self.facts[label] = {"seconds": seconds} | found
        print(label, self.facts[label], flush=True)

    def kill(self, victim: str, other: str) -> None:
        """Kill one server while both serve: when its memory is free, and how the other fares."""

        async def kill_midway() -> list[Completion]:
            lost = asyncio.create_task(self.servers[victim].send(self.burst(1)))
            kept = asyncio.create_task(self.servers[other].send(self.burst(2)))
            await asyncio.to_thread(self.wait_until, victim, holds=True)
            await asyncio.sleep(1)
            held = self.servers.resident_bytes(victim)
            await asyncio.to_thread(self.servers[victim].kill)
            seconds = await asyncio.to_thread(self.wait_until, victim, holds=False)
            self.facts[f"killed {victim}"] = {"held_bytes": held, "free_after_seconds": seconds}
            await lost
            return await kept

        start = time.monotonic()
        answers = asyncio.run(kill_midway())
        self.note(f"while {victim} was killed", {other: answers}, time.monotonic() - start)

    def wait_until(self, name: str, *, holds: bool) -> float:
        """Return how many seconds it took until a server holds memory, or none any more."""
        start = time.monotonic()
        while bool(self.servers.resident_bytes(name)) != holds:
            time.sleep(0.005)
        return time.monotonic() - start


def main() -> None:
    """Run, print, write JSON; fail if a request was lost."""
    arguments = command_line(__doc__)
    arguments.add_argument("--only-kill", action="store_true", help="leave the bursts out")
    options = arguments.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory(prefix="kv-", ignore_cleanup_errors=True) as folder:
        both = Beside(Path(folder))
        try:
            both.start(VLLM)
            both.start(SGLANG)
            both.servers.wait_ready()
            with Recorder(both.servers.open_ledger) as recorder:
                if not options.only_kill:
                    for name in (VLLM, SGLANG, VLLM, SGLANG):
                        both.send(f"burst on {name}", name)
                    both.send("bursts on both", VLLM, SGLANG)
            peaks = {name: recorder.recording.peak_bytes(name) for name in both.servers.by_name}
            both.facts["peak_bytes"] = peaks
            both.kill(SGLANG, VLLM)
            both.start(SGLANG)
            both.servers[SGLANG].wait_ready()
            both.kill(VLLM, SGLANG)
        finally:
            both.servers.kill()
            both.servers.keep_logs(options.json.parent, "beside")
            write(options.json, {"machine": describe_gpu()} | both.facts)
    if both.num_lost:
        raise SystemExit("requests were lost")


if __name__ == "__main__":
    main()
