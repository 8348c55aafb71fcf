"""The support matrix: what is locked, what ran on a host and on a GPU, as three columns."""

import json
from dataclasses import dataclass
from pathlib import Path

from kvcached_patches.engines import ENGINES
from kvcached_patches.locks import locked_releases, order, public

HOST, GPU = "host", "gpu"
TITLES = {"vllm": "vLLM", "sglang": "SGLang"}
HEAD = (
    "| engine | releases | locked | run on host memory | run on a GPU |",
    "|---|---|---|---|---|",
)


@dataclass(frozen=True)
class Run:
    """A recorded run.

    Attributes:
        distribution: The engine's package.
        release: Its version.
        where: `HOST` or `GPU`.
        date: When, as YYYY-MM-DD.
        device: On what.
        passed: What it showed, in a few words.
    """

    distribution: str
    release: str
    where: str
    date: str
    device: str
    passed: str


def read_runs(path: Path) -> list[Run]:
    """Return the recorded runs in a file."""
    return [Run(**values) for values in json.loads(path.read_text())]


def matrix(runs: list[Run]) -> str:
    """Return the matrix as a table in Markdown; releases with the same cells share a line."""
    lines = list(HEAD)
    for engine, served in ENGINES.items():
        locks: dict[str, list[str]] = {}
        for distribution in served.oldest:
            for release in locked_releases(distribution):
                locks.setdefault(release, []).append(f"`{distribution}`")
        rows: list[tuple[str, str, tuple[str, str, str]]] = []
        for release in sorted(locks, key=order):
            found = [
                run
                for run in runs
                if run.distribution in served.oldest and public(run.release) == release
            ]
            cells = (", ".join(sorted(locks[release])), _cell(found, HOST), _cell(found, GPU))
            if rows and rows[-1][2] == cells:
                rows[-1] = (rows[-1][0], release, cells)
            else:
                rows.append((release, release, cells))
        for first, last, cells in rows:
            span = first if first == last else f"{first} to {last}"
            lines.append(" | ".join([f"| {TITLES[engine]}", span, *cells]) + " |")
    return "\n".join(lines)


def _cell(runs: list[Run], where: str) -> str:
    found = [run for run in runs if run.where == where]
    return "; ".join(f"{run.passed} ({run.device}, {run.date})" for run in found) or "not run"
