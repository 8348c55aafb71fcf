"""What is locked and what ran, in Markdown: a table of ticks, and the recorded runs as a list."""

import json
import textwrap
from dataclasses import dataclass
from pathlib import Path

from kvcached_patches.engines import ENGINES
from kvcached_patches.locks import locked_releases, order, public

HOST, GPU = "host", "gpu"
TITLES = {"vllm": "vLLM", "sglang": "SGLang"}
PLACES = {HOST: "CPU", GPU: "GPU"}
YES, NO = "✓", ""
HEAD = ("| engine | releases | locked | CPU | GPU |", "|---|---|:-:|:-:|:-:|")
LINE_LENGTH = 110


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


def ticks(runs: list[Run]) -> str:
    """Return the table of all locked releases; releases with the same ticks share a line."""
    lines = list(HEAD)
    for engine, served in ENGINES.items():
        rows: list[tuple[str, str, tuple[str, str]]] = []
        for release in _releases(served.oldest):
            places = {run.where for run in _of(runs, served.oldest, release)}
            cells = (YES if HOST in places else NO, YES if GPU in places else NO)
            if rows and rows[-1][2] == cells:
                rows[-1] = (rows[-1][0], release, cells)
            else:
                rows.append((release, release, cells))
        for first, last, cells in rows:
            span = first if first == last else f"{first} to {last}"
            lines.append(" | ".join([f"| {TITLES[engine]}", span, YES, *cells]) + " |")
    return "\n".join(lines)


def list_runs(runs: list[Run]) -> str:
    """Return what every release showed where it ran, a heading for each release."""
    blocks = []
    for engine, served in ENGINES.items():
        for release in _releases(served.oldest):
            found = _of(runs, served.oldest, release)
            if not found:
                continue
            blocks.append(f"### {TITLES[engine]} {release}")
            blocks.append("\n".join(_item(run) for run in found))
    return "\n\n".join(blocks)


def _releases(distributions: dict[str, str]) -> list[str]:
    found = {release for name in distributions for release in locked_releases(name)}
    return sorted(found, key=order)


def _of(runs: list[Run], distributions: dict[str, str], release: str) -> list[Run]:
    found = [
        run for run in runs if run.distribution in distributions and public(run.release) == release
    ]
    return sorted(found, key=lambda run: (run.where == GPU, run.date))


def _item(run: Run) -> str:
    text = f"* {PLACES[run.where]} ({run.device}, {run.date}): {run.passed}."
    return textwrap.fill(
        text, LINE_LENGTH, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False
    )
