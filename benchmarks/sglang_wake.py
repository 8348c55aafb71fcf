"""SGLang's memory saver beside a neighbour that fills the device: sleep, wake, the same tokens.

    PYTHONPATH=tests:$PYTHONPATH python benchmarks/sglang_wake.py --out FOLDER

`sleeper` has its weights, graphs and pools in SGLang's memory saver, with a copy of the weights in
host memory. Each round it is released, `neighbour` fills what came free with its prefix cache, and
`sleeper` is resumed: the neighbour has to give. In some rounds the neighbour's requests need all of
it: the wake has to be refused, a request to the sleeper waits, and both are served when the
neighbour's requests are gone. Ballast leaves a few GiB for KV caches, whatever the GPU has.
"""

import argparse
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from helpers.weights import make_weights
from parts.machine import describe_gpu
from parts.record import write

from kvcached_core.units import GIB, MIB
from kvcached_demo.harness.engines import SGLANG
from kvcached_demo.harness.load import generate
from kvcached_demo.harness.servers import Servers

SLEEPER, NEIGHBOUR = "sleeper", "neighbour"
OPTIONS = (*SGLANG.gpu_options(8192), "--skip-tokenizer-init", "--skip-server-warmup")
FLAGS = {
    SLEEPER: (
        *("--enable-memory-saver", "--enable-weights-cpu-backup", "--disable-radix-cache"),
        *("--cuda-graph-max-bs-decode", "8", "--max-running-requests", "32"),
    ),
    NEIGHBOUR: ("--disable-cuda-graph", "--max-running-requests", "128"),
}
HEADROOM_SHARE = 0.02  # our default
FULL_BYTES = 256 * MIB
BUSY_SECONDS = 60.0


class Wake:
    """Both servers, and what became of each round."""

    def __init__(self, workspace: Path, shape: str) -> None:
        self.servers = Servers(workspace)
        model = make_weights(workspace / "model", shape)
        self.rounds: list[dict[str, Any]] = []
        self.seed = 0
        for name, flags in FLAGS.items():
            self.servers.start(SGLANG, name, model, *flags, options=OPTIONS)

    def post(self, name: str, path: str, body: Any, seconds: float = 120.0) -> httpx.Response:
        """Send `body` to a server."""
        return self.servers[name].post(f"/{path}", body, seconds)

    def ask(self, name: str, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        """Return the tokens that a server answers with."""
        return generate(self.servers[name].url, prompts, num_tokens)

    def prompts(self, number: int, num_tokens: int) -> list[list[int]]:
        """Return prompts that nobody sent before."""
        self.seed += 1
        source = random.Random(self.seed)
        return [[source.randrange(3, 30_000) for _ in range(num_tokens)] for _ in range(number)]

    def free_bytes(self) -> int:
        """Return what is free for KV caches."""
        return self.servers.device().free_bytes

    def leave(self, num_bytes: int) -> Any:
        """Take all of the device but `num_bytes` for KV caches; return what holds it."""
        import torch

        torch.cuda.init()
        torch.zeros(1, device="cuda")
        free, total = torch.cuda.mem_get_info()
        size = free - num_bytes - int(HEADROOM_SHARE * total)
        return torch.empty(max(size, 0), dtype=torch.uint8, device="cuda")

    def fill(self) -> None:
        """Let the neighbour's prefix cache take what is free."""
        for _ in range(40):
            if self.free_bytes() < FULL_BYTES:
                return
            self.ask(NEIGHBOUR, self.prompts(16, 4000), 1)

    def keep_busy(self) -> threading.Thread:
        """Let the neighbour's requests need all that there is."""
        body = {
            "input_ids": self.prompts(128, 1500),
            "sampling_params": {"temperature": 0.0, "max_new_tokens": 6000, "ignore_eos": True},
        }
        load = threading.Thread(target=lambda: self.post(NEIGHBOUR, "generate", body, 240.0))
        load.start()
        deadline = time.monotonic() + BUSY_SECONDS
        while time.monotonic() < deadline:
            row = self.servers.view(NEIGHBOUR)
            idle = row.resident_bytes - row.used_bytes
            if self.free_bytes() + idle < GIB:
                return load
            time.sleep(0.1)
        raise RuntimeError("the neighbour's requests do not fill the device")

    def round(self, expected: list[list[int]], questions: list[list[int]], *, busy: bool) -> None:
        """Release, let the neighbour take it, and resume; keep what happened."""
        facts: dict[str, Any] = {"busy": busy, "free_awake_bytes": self.free_bytes()}
        facts["release_seconds"] = timed(
            lambda: self.post(SLEEPER, "release_memory_occupation", {}).raise_for_status()
        )
        facts["free_asleep_bytes"] = self.free_bytes()
        waiting: threading.Thread | None = None
        late: list[list[list[int]]] = []
        if busy:
            load = self.keep_busy()
            start = time.monotonic()
            answer = self.post(SLEEPER, "resume_memory_occupation", {})
            facts["refused_seconds"] = time.monotonic() - start
            facts["status"], facts["text"] = answer.status_code, answer.text
            waiting = threading.Thread(
                target=lambda: late.append(self.ask(SLEEPER, questions, len(expected[0])))
            )
            waiting.start()
            self.post(NEIGHBOUR, "abort_request", {"abort_all": True})
            load.join()
            facts["answered_asleep"] = not waiting.is_alive()
        else:
            self.fill()
        facts["free_filled_bytes"] = self.free_bytes()
        facts["resume_seconds"] = timed(
            lambda: self.post(SLEEPER, "resume_memory_occupation", {}).raise_for_status()
        )
        if waiting is not None:
            waiting.join()
            facts["late_right"] = late == [expected]
        facts["right"] = self.ask(SLEEPER, questions, len(expected[0])) == expected
        self.rounds.append(facts)


def timed(action: Callable[[], Any]) -> float:
    """Return the seconds that an action takes."""
    start = time.monotonic()
    action()
    return time.monotonic() - start


def is_good(facts: dict[str, Any]) -> bool:
    """Return whether a round went as it must."""
    if not facts["busy"]:
        return bool(facts["right"])
    said = facts["text"]
    return bool(
        facts["status"] == httpx.codes.BAD_REQUEST
        and "missing" in said
        and f"{NEIGHBOUR} (" in said
        and facts["right"]
        and facts["late_right"]
        and not facts["answered_asleep"]
    )


def main() -> None:
    """Run the rounds; print a table, write everything to a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for facts and logs")
    parser.add_argument("--shape", default="llama-1b")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--busy-every", type=int, default=7)
    parser.add_argument("--kv-gib", type=float, default=4.0, help="room for KV caches, both awake")
    parser.add_argument("--seconds", type=float, default=200.0, help="no new round after this")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kvwake", dir="/dev/shm") as folder:
        wake = Wake(Path(folder), options.shape)
        problem = run(wake, options, begun)
    logs = "".join((options.out / f"{name}.log").read_text(errors="replace") for name in FLAGS)
    facts = {"machine": describe_gpu(), "rounds": wake.rounds, "problem": problem}
    write(options.out / "sglang_wake.json", facts)
    print(f"{time.monotonic() - begun:.0f} s")
    is_fine = report(wake.rounds, logs.count("Traceback"))
    if problem:
        print(problem)
    sys.exit(int(problem is not None or not is_fine))


def run(wake: Wake, options: argparse.Namespace, begun: float) -> str | None:
    """Run the rounds; return what ended them too early, or None. The servers are gone then."""
    try:
        wake.servers.wait_ready(seconds=300)
        questions = wake.prompts(4, 300)
        expected = wake.ask(SLEEPER, questions, 24)
        ballast = wake.leave(int(options.kv_gib * GIB))
        for number in range(1, options.rounds + 1):
            if time.monotonic() - begun > options.seconds:
                return f"{number - 1} of {options.rounds} rounds in {options.seconds:.0f} s"
            wake.round(expected, questions, busy=number % options.busy_every == 0)
        del ballast
    except Exception as error:  # noqa: BLE001  what was measured up to here is kept
        return f"{type(error).__name__}: {error}"[-2000:]
    finally:
        for server in wake.servers.by_name.values():
            (options.out / server.log.name).write_bytes(server.log.read_bytes())
        wake.servers.kill()
    return None


def report(rounds: list[dict[str, Any]], num_tracebacks: int) -> bool:
    """Print a table; return whether everything went as it must."""
    for key in ("release_seconds", "resume_seconds", "refused_seconds"):
        found = [facts[key] for facts in rounds if key in facts]
        if found:
            print(f"{key:16} median {statistics.median(found):6.2f}  max {max(found):6.2f}")
    for facts in rounds:
        if "text" in facts:
            print(facts["status"], facts["text"][:300])
    num_good = sum(is_good(facts) for facts in rounds)
    print(f"rounds {len(rounds)}, good {num_good}, tracebacks in the logs {num_tracebacks}")
    return num_good == len(rounds) and not num_tracebacks


if __name__ == "__main__":
    main()
