"""A program that is no engine beside two servers whose caches and weights fill the device.

    python benchmarks/programs.py --json programs.json

Two 8B servers that yield their weights fill the device. Then `kvcached run` makes room for a
process that allocates 20 GiB with torch, twenty times; both servers are asked before, while it
holds its memory, and after. A few rounds more need so much that weights have to go, too. `--tiny`
rehearses it on a CPU: there the program allocates host memory.

    python benchmarks/programs.py --json programs.json --by driver --held-gib 70 --large-need 40GiB

Caches are filled again for each round, torch takes seconds to import, and vLLM to compile: these
options, and `--eager`, make less of the device to be filled and the start short, and let the
program allocate by the driver alone.
"""

import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

from parts.record import begin_record, command_line
from parts.vllm_servers import READY_SECONDS, kv_bytes_per_token
from parts.yielding import FIRST, SECOND, Run, running
from parts.yielding_servers import TESTS

from kvcached_core.ledger.view import InstanceView
from kvcached_core.units import GIB, MIB, format_bytes, parse_bytes
from kvcached_demo.harness.model import KV_BYTES_PER_TOKEN

NAMES = (FIRST, SECOND)
PROGRAM = "program"
# As the command `kvcached` does, which is not beside every interpreter that has the package.
KVCACHED = (sys.executable, "-c", "from kvcached_core.cli.app import main; main()")
ALLOCATING = TESTS / "helpers" / "allocating.py"
# Whole gigabytes, so that nothing is lost to torch's own rounding.
WITH_TORCH = """
import sys, torch
num_gib = int(sys.argv[1]) >> 30
held = [torch.ones(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(num_gib)]
torch.cuda.synchronize()
print("all", flush=True)
sys.exit(int(sys.stdin.readline() or 1))
"""
WITH_DRIVER = """
import sys
from cuda.bindings import driver
def call(function, *arguments):
    code, *found = function(*arguments)
    if code: sys.exit(str(code))
    return found[0] if found else None
call(driver.cuInit, 0)
call(driver.cuCtxSetCurrent, call(driver.cuDevicePrimaryCtxRetain, call(driver.cuDeviceGet, 0)))
for _ in range(int(sys.argv[1]) >> 30):
    call(driver.cuMemsetD8, call(driver.cuMemAlloc, 1 << 30), 1, 1 << 30)
call(driver.cuCtxSynchronize)
print("all", flush=True)
sys.exit(int(sys.stdin.readline() or 1))
"""
PROGRAMS = {"torch": WITH_TORCH, "driver": WITH_DRIVER}
WAIT_SECONDS, SEEN_SECONDS = 120, 5.0
TINY_POOL, TINY_NEED, TINY_LARGE_NEED = 192 * MIB, "96MiB", "164MiB"


@dataclass(frozen=True)
class Size:
    """What differs between a GPU and a rehearsal: prompts that fill caches, and when they do."""

    num_tokens: int
    token_bytes: int
    full_bytes: int


GPU = Size(8000, kv_bytes_per_token("llama-8b"), 512 * MIB)
TINY = Size(400, KV_BYTES_PER_TOKEN, 16 * MIB)


class Rounds:
    """Rounds with programs that need one size.

    Args:
        run: The servers.
        need: What each program needs, and allocates.
        script: What it is on a GPU.
    """

    def __init__(self, run: Run, need: str, script: str) -> None:
        self.run, self.need, self.script = run, need, script
        self.size = TINY if run.tiny else GPU
        self._seed = 1000
        self.rows: list[dict[str, Any]] = []

    def do(self) -> None:
        """Do one more."""
        self.rows.append(self._one())

    def _one(self) -> dict[str, Any]:
        run, before_wrong, before_failed = self.run, self.run.num_wrong, self.run.num_failed
        free_bytes = self._fill()
        before = self._rows()
        found: dict[str, Any] = {"free_bytes": free_bytes}
        start = time.perf_counter()
        pipe = subprocess.PIPE
        with subprocess.Popen(
            self._command(), env=self._environ(), stdin=pipe, stdout=pipe, stderr=pipe, text=True
        ) as process:
            assert process.stdout is not None  # noqa: S101  mypy: it is a pipe
            has_all = process.stdout.readline() == "all\n"
            found["allocated_seconds"] = time.perf_counter() - start
            if has_all:
                found |= self._seen(start)
                given = self._rows()
                for word in ("cached", "weights"):
                    found[f"given_{word}_bytes"] = sum(
                        getattr(before[name], f"{word}_bytes")
                        - getattr(given[name], f"{word}_bytes")
                        for name in NAMES
                    )
                for name in NAMES:
                    run.ask(name)
            _, errors = process.communicate("0\n" if has_all else None)
        for name in NAMES:
            run.ask(name)
        return found | {
            "has_all": has_all and process.returncode == 0,
            "exit_code": process.returncode,
            "errors": errors[-2000:],
            "failed": run.num_failed - before_failed,
            "wrong": run.num_wrong - before_wrong,
        }

    def _fill(self) -> int:
        """Let both prefix caches take what there is; return what is left."""
        size, left = self.size, -1
        while True:
            device = self.run.servers.device()
            free_bytes = device.free_bytes
            if free_bytes < size.full_bytes or free_bytes == left:
                return free_bytes
            left = free_bytes
            num = free_bytes // size.token_bytes // size.num_tokens // len(NAMES) + 1
            for name in NAMES:
                self._seed += 1
                self.run.load(name, int(min(num, 16)), size.num_tokens, 1, seed=self._seed)

    def _command(self) -> list[str]:
        num_bytes = str(parse_bytes(self.need, what="need"))
        words = [ALLOCATING, num_bytes] if self.run.tiny else ["-c", self.script, num_bytes]
        options = ["--need", self.need, "--wait", str(WAIT_SECONDS), "--name", PROGRAM]
        return [str(word) for word in (*KVCACHED, "run", *options, "--", sys.executable, *words)]

    def _environ(self) -> dict[str, str]:
        return os.environ | {"KVCACHED_DIR": str(self.run.servers.directory)}

    def _rows(self) -> dict[str, InstanceView]:
        return {row.name: row for row in self.run.servers.device().instances}

    def _seen(self, start: float) -> dict[str, Any]:
        """Wait until the row says that all of it is allocated."""
        deadline = time.perf_counter() + SEEN_SECONDS
        slack_bytes = 2 * MIB if self.run.tiny else 0
        while True:
            row, now = self._rows()[PROGRAM], time.perf_counter()
            if row.static_bytes <= slack_bytes or now > deadline:
                return {
                    "seen_seconds": now - start,
                    "held_bytes": row.resident_bytes,
                    "announced_bytes": row.static_bytes,
                }
            time.sleep(0.02)


def table(results: dict[str, Any]) -> str:
    """Return the figures as text."""
    lines = [f"failed {results.get('failed')}, wrong tokens {results.get('wrong')}"]
    for part in results.get("parts", []):
        rows = part["rounds"]
        done = [row for row in rows if row["has_all"]]
        lines.append(f"--need {part['need']}: all of it in {len(done)} of {len(rows)} rounds")
        if not done:
            continue
        for title, word, unit in (
            ("until it has all, s", "allocated_seconds", 1.0),
            ("until all is seen, s", "seen_seconds", 1.0),
            ("free before, MiB", "free_bytes", MIB),
            ("held as seen, MiB", "held_bytes", MIB),
            ("announced still, MiB", "announced_bytes", MIB),
            ("caches given, MiB", "given_cached_bytes", MIB),
            ("weights given, MiB", "given_weights_bytes", MIB),
        ):
            values = [row[word] / unit for row in done]
            lines.append(
                f"  {title:24} median {statistics.median(values):10.2f}, "
                f"{min(values):.2f} to {max(values):.2f}"
            )
        lines += [
            f"  round {number}: {row['errors'].strip()[-300:]}"
            for number, row in enumerate(rows)
            if not row["has_all"]
        ]
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    arguments = command_line(__doc__, can_rehearse=True)
    arguments.add_argument("--runner", type=int, choices=(1, 2), help="vLLM's model runner")
    arguments.add_argument("--need", help="what the program allocates")
    arguments.add_argument("--number", type=int, default=20, help="rounds with that")
    arguments.add_argument("--large-need", help="so much that weights have to go, too")
    arguments.add_argument("--large-number", type=int, default=3, help="rounds with that")
    arguments.add_argument("--by", choices=PROGRAMS, default="torch", help="what it allocates with")
    arguments.add_argument("--eager", action="store_true", help="vLLM: no compilation")
    arguments.add_argument(
        "--held-gib", type=int, default=0, help="of the device, kept by this process"
    )
    options = arguments.parse_args()
    parts = [
        (options.need or (TINY_NEED if options.tiny else format_bytes(20 * GIB)), options.number),
        (options.large_need or (TINY_LARGE_NEED if options.tiny else "70%"), options.large_number),
    ]
    record = begin_record(options)
    record.add(by=options.by, held_gib=options.held_gib)
    held = hold(options.held_gib)
    words = {"runner": options.runner, "pool_bytes": TINY_POOL}
    try:
        with running(Run, record, tiny=options.tiny, **words) as run:
            if options.tiny:
                run.environ["KVCACHED_PAGE_BYTES"] = str(2 * MIB)
            for number, name in enumerate(NAMES, 1):
                eager = ("--enforce-eager",) if options.eager else ()
                run.start(name, number, *eager, is_caching=True)
            run.servers.wait_ready(seconds=READY_SECONDS)
            run.wait_copied(*NAMES)
            for name in NAMES:
                run.ask(name)
            done: list[dict[str, Any]] = []
            for need, num in parts:
                rounds = Rounds(run, as_bytes(need, run), PROGRAMS[options.by])
                done.append({"need": need, "rounds": rounds.rows})
                for _ in range(num):
                    rounds.do()
                    record.add(parts=done)
    finally:
        held.clear()
        print(table(record.results))


def hold(num_gib: int) -> list[Any]:
    """Allocate so much of the device, as a stranger would; return what keeps it."""
    if not num_gib:
        return []
    import torch

    return [torch.zeros(GIB, dtype=torch.uint8, device="cuda") for _ in range(num_gib)]


def as_bytes(need: str, run: Run) -> str:
    """Return a size in bytes, whole GiB on a GPU; a share is one of what all share."""
    capacity = run.servers.device().capacity_bytes
    num_bytes = parse_bytes(need, what="need", whole_bytes=capacity)
    return str(num_bytes if run.tiny else num_bytes // GIB * GIB)


if __name__ == "__main__":
    main()
