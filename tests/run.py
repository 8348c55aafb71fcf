"""Run the tests of several environments, three pytest processes at a time (make quick, make test).

    python tests/run.py quick|test|every-release

It ends with the slowest tests, and with the time against the budget in `.ci/budget.toml`, which is
a measure and not a bar: machines of one size have differed by more than twice.
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue

ROOT = Path(__file__).parents[1]
BUDGET = ROOT / ".ci" / "budget.toml"
NUM_AT_A_TIME = 3  # on two cores: tests of engines wait, for each other's processes and for time
NUM_SLOWEST = 25
NUM_BUDGETS = 3  # after so many times its budget a job hangs, where no test's own limit ends it
# More threads of torch in each process of a test would spin for the cores of the other jobs.
ENVIRON = {"OMP_NUM_THREADS": "1", **os.environ}
DURATION = re.compile(r"^(\d+\.\d+)s (?:call|setup|teardown) +(\S.*)$", re.MULTILINE)
FAILED = re.compile(r"^(?:FAILED|ERROR) .*$", re.MULTILINE)
COUNT = re.compile(r"(\d+) (passed|failed|errors?|skipped|xfailed|xpassed|warnings?)\b")
LAST_LINE = re.compile(
    r"^(?:=+ )?(.*\d+ (?:passed|failed|error|skipped).* in .*?)(?: =+)?$", re.MULTILINE
)

VLLM = ".venv/bin/python"
OLDER_VLLM = ".venv-vllm-0.28.0/bin/python"
SGLANG = ".venv-sglang-0.5.23/bin/python"
OLDER_SGLANG = ".venv-sglang-0.5.15/bin/python"
RAY = ".venv-ray/bin/python"


@dataclass(frozen=True)
class Job:
    """One call of pytest."""

    name: str
    python: str
    arguments: tuple[str, ...]

    def run(self, limit_seconds: float) -> tuple[int, str]:
        """Run it to its end and pass each line on; return the exit code and all lines.

        After `limit_seconds` it is aborted, and writes the stacks of its threads.
        """
        process = subprocess.Popen(
            [ROOT / self.python, "-m", "pytest", f"--durations={NUM_SLOWEST}", *self.arguments],
            cwd=ROOT,
            env=ENVIRON,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        limit = threading.Timer(limit_seconds, process.send_signal, [signal.SIGABRT])
        limit.daemon = True
        limit.start()
        lines = []
        for line in process.stdout or ():
            print(f"{self.name} | {line}", end="", flush=True)
            lines.append(line)
        returncode = process.wait()
        limit.cancel()
        return returncode, "".join(lines)


def marked(expression: str) -> tuple[str, ...]:
    """Select tests by their marks, beside those that a plain pytest leaves out."""
    return "-m", f"({expression}) and not gpu and not prometheus"


WITHOUT_SERVERS = marked("not slow and not every_release")
SERVERS = marked("slow and not every_release")
# What says little about the older SGLang that the newest does not: our books, and what takes long.
WITH_THE_NEWEST = (
    "allocators",
    "caches",
    "documented_commands",
    "fairness",
    "hicache",
    "kv_events",
)
OLDER_SGLANG_TESTS = (
    *marked("(not slow or older_release) and not vllm"),
    *(f"--ignore=tests/sglang/test_sglang_{name}.py" for name in WITH_THE_NEWEST),
    "tests/sglang",
)
NOT_THE_NEWEST = marked("not vllm and not newest_release")
GATEWAY = "tests/gateway"
CORE = ("tests/core", "tests/patches")
ADAPTER = ("tests/vllm", "tests/demo", "tests/benchmarks")
FOLDERS = (*CORE, *ADAPTER, GATEWAY)

# The longest first: what is short fills the end.
JOBS = {
    "quick": [
        Job("vLLM 0.32.0, without a server", VLLM, (*WITHOUT_SERVERS, *FOLDERS)),
        Job("SGLang 0.5.23, without a server", SGLANG, (*WITHOUT_SERVERS, "tests/sglang")),
    ],
    "test": [
        Job("SGLang 0.5.23", SGLANG, (*marked("not every_release"), "tests/sglang")),
        Job("vLLM 0.32.0, servers", VLLM, (*SERVERS, *CORE, *ADAPTER)),
        Job("vLLM 0.32.0, without a server", VLLM, (*WITHOUT_SERVERS, *ADAPTER, GATEWAY)),
        Job("the core", VLLM, (*WITHOUT_SERVERS, *CORE)),
        Job("servers behind the gateway", VLLM, (*SERVERS, GATEWAY)),
        Job("SGLang 0.5.15", OLDER_SGLANG, OLDER_SGLANG_TESTS),
        Job("vLLM 0.28.0", OLDER_VLLM, (*marked("older_release"), "tests/vllm")),
        Job("Ray 2.60.0", RAY, (*marked("not every_release"), "tests/ray")),
    ],
    "every-release": [
        Job("SGLang 0.5.15, all it serves", OLDER_SGLANG, (*NOT_THE_NEWEST, "tests/sglang")),
        Job("SGLang 0.5.23, the rest", SGLANG, (*marked("every_release"), "tests/sglang")),
        Job("vLLM 0.32.0, the rest", VLLM, (*marked("every_release"), *FOLDERS)),
        Job("vLLM 0.28.0, all", OLDER_VLLM, (*marked("older_release or slow"), "tests/vllm")),
        Job("Ray 2.60.0, the rest", RAY, (*marked("every_release"), "tests/ray")),
        # It fails where Debian's `prometheus` is not installed.
        Job("a real Prometheus", VLLM, ("-m", "prometheus", "tests/core/test_prometheus.py")),
    ],
}


def run_all(jobs: list[Job], limit_seconds: float) -> Iterator[tuple[Job, int, str]]:
    """Run the jobs; yield each with its exit code and its lines when it has ended."""
    waiting: Queue[Job] = Queue()
    ended: Queue[tuple[Job, int, str]] = Queue()
    for job in jobs:
        waiting.put(job)

    def work() -> None:
        while True:
            try:
                job = waiting.get_nowait()
            except Empty:
                return
            ended.put((job, *job.run(limit_seconds)))

    for _ in range(NUM_AT_A_TIME):
        threading.Thread(target=work, daemon=True).start()
    for _ in jobs:
        yield ended.get()


def clock(seconds: float) -> str:
    """Write seconds as minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def main() -> int:
    """Run the jobs of one target; return the exit code."""
    target = sys.argv[1]
    # A shell lets what it runs in the background ignore these; servers are stopped by them.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    began = float(os.environ.get("STARTED", time.time()))
    budget = tomllib.loads(BUDGET.read_text())[target] * 60
    counts: Counter[str] = Counter()
    slowest: list[tuple[float, str]] = []
    failed: list[str] = []
    ends: list[str] = []
    code = 0
    for job, returncode, text in run_all(JOBS[target], NUM_BUDGETS * budget):
        code = code or returncode
        last = (LAST_LINE.findall(text) or ["no summary"])[-1]
        ends.append(f"{job.name}: {last}" + f" (exit code {returncode})" * bool(returncode))
        counts.update({what.rstrip("s"): int(number) for number, what in COUNT.findall(last)})
        failed += [f"{job.name}: {line}" for line in FAILED.findall(text)]
        slowest += [(float(seconds), test) for seconds, test in DURATION.findall(text)]
    print(f"\n===== slowest {NUM_SLOWEST} of all =====")
    for seconds, test in sorted(slowest, reverse=True)[:NUM_SLOWEST]:
        print(f"{seconds:7.2f}s {test}")
    print("\n===== summary =====", *failed, *ends, sep="\n")
    seconds = time.time() - began
    verdict = "over" if seconds > budget else "within"
    said = ", ".join(f"{number} {what}" for what, number in sorted(counts.items()))
    print(
        f"===== {said} in {seconds:.2f}s ({clock(seconds)}, environments included; {verdict} the "
        f"budget of {clock(budget)}) =====",
        flush=True,
    )
    return code


if __name__ == "__main__":
    sys.exit(main())
