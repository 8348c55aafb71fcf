"""Engines that copy to the host, as tests and benchmarks start them, and how they end."""

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helpers.engines import VANILLA, Offline, Run, finish, offline_in, ours, report_of
from helpers.offload_plugin import add_plugin

MIB = 1 << 20
DELAY_MS = (20, 60)
CORES = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}  # a core for each of two ranks
ANSWERED = "all answered"
# How the delayed copier, and our debugging, say that a copy met memory that was gone.
GONE = ("SIGSEGV", "UnmappedBlockError", "copied other bytes", "was written over")


def offloading(folder: Path, **settings: str) -> dict[str, str]:
    """Return the variables of an elastic engine that finds the delayed copier."""
    return ours(folder, KVCACHED_DEBUG="1", **add_plugin(folder / "plugin"), **settings)


def copier(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return what `transfer` takes."""
    return {
        "num_bytes": 512 * MIB,
        "delay_ms": DELAY_MS,
        "copier_report": str(folder / "copied.json"),
        **changes,
    }


def rounds_like_vanilla(
    folder: Path,
    model: Path,
    acts: Sequence[str],
    *,
    delay_ms: tuple[int, int] = DELAY_MS,
    chunk_blocks: int = 1,
    **options: Any,
) -> dict[str, Any]:
    """Return what an elastic engine reports of `offload_rounds`, and see that it does well.

    It answers as vanilla does, the device keeps nothing between the rounds, and all comes back.

    Args:
        folder: Where both run.
        model: What both serve.
        acts: What the elastic one does beside, `one_by_one` among it.
        delay_ms: How long its copies take.
        chunk_blocks: The blocks of a chunk of its tier.
        options: What both are given.
    """
    changes = {"delay_ms": delay_ms, "blocks_per_chunk": chunk_blocks}
    start, of_copier = offline_in(folder, model), copier(folder, **changes)
    started = [
        start(VANILLA, "offload_rounds", **options),
        start(offloading(folder), "offload_rounds", copier=of_copier, acts=acts, **options),
    ]
    vanilla, report = map(report_of, started)
    assert report["tokens"] == vanilla["tokens"]
    assert len({tuple(tokens) for tokens in report["tokens"][0]}) > 10
    assert all(pages == [[0]] for pages in report["after_trim"])
    assert all(found == full > 0 for found, full in report["hits"])
    assert report["copied"]["loads"] > 0
    assert report["num_told_tokens"] == report["num_hit_tokens"]  # as `kvcached top` says it
    return report


def two_ranks(start: Offline, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what an engine of two ranks reports, and one without us.

    One rank's copies end later: what only that one reads stays on both.
    """
    of_copier = copier(folder, copier_report=None, rank_delay_ms=300)
    options = {"tensor_parallel_size": 2}
    started = [
        start(CORES | one, "offload_rounds", copier=of_copier, options=options, acts=acts)
        for one, acts in ((offloading(folder), ["hold_for_both_ranks"]), (VANILLA, []))
    ]
    elastic, vanilla = map(report_of, started)
    return elastic, vanilla


def race(
    start: Offline,
    folder: Path,
    *,
    seed: int,
    num_requests: int,
    chunk_blocks: int = 1,
    **options: Any,
) -> Run:
    """Let an engine race to its end; see `offload_race`."""
    environ = offloading(folder, KVCACHED_HOST_POOL="48MiB", KVCACHED_PAGE_BYTES="2MiB")
    changes = {"delay_ms": (0, 50), "copier_seed": seed, "blocks_per_chunk": chunk_blocks}
    of_copier = copier(folder, num_bytes=32 * MIB, **changes)
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
