"""Engines that copy to the host, as tests and benchmarks start them, and how they end."""

import signal
from pathlib import Path
from typing import Any

from helpers.engines import Offline, Run, finish
from helpers.offload_plugin import add_plugin

MIB = 1 << 20
DELAY_MS = (20, 60)
ANSWERED = "all answered"
# How the delayed copier, and our debugging, say that a copy met memory that was gone.
GONE = ("SIGSEGV", "UnmappedBlockError", "copied other bytes", "was written over")


def ours(folder: Path, **settings: str) -> dict[str, str]:
    """Return the variables of an elastic engine that finds the delayed copier."""
    return {
        "ENABLE_KVCACHED": "1",
        "KVCACHED_DIR": str(folder / "kv"),
        "KVCACHED_HOST_POOL": "512MiB",
        "KVCACHED_DEBUG": "1",
        **add_plugin(folder / "plugin"),
        **settings,
    }


def copier(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return what `transfer` takes."""
    return {
        "num_bytes": 512 * MIB,
        "delay_ms": DELAY_MS,
        "copier_report": str(folder / "copied.json"),
        **changes,
    }


def race(start: Offline, folder: Path, *, seed: int, num_requests: int, **options: Any) -> Run:
    """Let an engine race to its end; see `offload_race`."""
    environ = ours(folder, KVCACHED_HOST_POOL="48MiB", KVCACHED_PAGE_BYTES="2MiB")
    of_copier = copier(folder, num_bytes=32 * MIB, delay_ms=(0, 50), copier_seed=seed)
    numbers = {"seed": seed, "num_requests": num_requests}
    return finish(start(environ, "offload_race", copier=of_copier, **numbers, **options))


def check_race(run: Run, *, min_preemptions: int = 0) -> None:
    """Assert that a race ended well, that all happened in it, and that nothing is kept."""
    assert run.returncode == 0, run.errors[-4000:]
    report = run.report
    counts = report["counts"]
    happened = ("answered", "aborted", "taken", "trims", "resets")
    assert all(counts[word] > 0 for word in happened)
    assert counts["preemptions"] >= min_preemptions
    assert min(report["copied"]["stores"], report["copied"]["loads"]) > 0
    assert report["hit_tokens"] > 0
    assert report["num_held"] == 0
    assert len(report["pages"][0]) <= 2


def end_of(run: Run) -> str:
    """Return how a race ended: as it shall, by a signal, or by which exception."""
    if run.returncode == 0:
        return ANSWERED
    if run.returncode < 0:
        return signal.Signals(-run.returncode).name
    errors = [line for line in run.errors.splitlines() if "Error" in line.partition(": ")[0]]
    return errors[-1].strip()[-200:] if errors else f"exit code {run.returncode}"
