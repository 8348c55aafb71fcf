"""A picture's values, read from the records by paths as a sentence's are, and where it lies.

`pictures.toml` lists the pictures. A picture has panels, and a panel has one of three forms: `rows`
with a median and a range each, `lines` of points, or `areas` over time, stacked.
"""

import hashlib
import json
import re
import statistics
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from figures.sentence import HERE
from figures.value import RESULTS, Spread, evaluate

IMAGES = HERE.parents[1] / "docs" / "images"
DIGEST = re.compile(r"values ([0-9a-f]{64})")


@dataclass(frozen=True)
class Line:
    """Values with a name.

    Attributes:
        label: The name, as the picture shows it.
        x: Where each value stands; empty for a row.
        y: The values; of a row the median alone.
        low: The least of what a row's median is of; empty for others.
        high: The most of it.
        mark: What the picture tells rows apart by, such as an engine's name.
    """

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    mark: str = ""


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        form: `rows`, `lines` or `areas`.
        title: Above the axes.
        x: What the horizontal axis shows, with its unit.
        y: The vertical one; empty where rows have names.
        is_log: Whether the axis of the values is a logarithmic one.
        level: Where a line is drawn through all, such as 1 for a ratio; None draws none.
        level_label: What that line is.
        values: What is drawn.
    """

    form: str
    title: str
    x: str
    y: str
    is_log: bool
    level: float | None
    level_label: str
    values: tuple[Line, ...]


@dataclass(frozen=True)
class Picture:
    """A drawing of records.

    Attributes:
        name: The file's name in docs/images, without its ending.
        panels: From left to right.
    """

    name: str
    panels: tuple[Panel, ...]

    @property
    def path(self) -> Path:
        """Where it lies."""
        return IMAGES / f"{self.name}.svg"

    @property
    def digest(self) -> str:
        """A number for all that it shows; the file says it, so a test sees an old picture."""
        said = json.dumps([asdict(panel) for panel in self.panels], sort_keys=True)
        return hashlib.sha256(said.encode()).hexdigest()


def read_pictures(file: Path = HERE / "pictures.toml", results: Path = RESULTS) -> list[Picture]:
    """Return all pictures with their values.

    Raises:
        ValueError: If a path leads nowhere; the message names it and what there is.
    """
    return [
        Picture(entry["name"], tuple(_panel(panel, results) for panel in entry["panel"]))
        for entry in tomllib.loads(file.read_text())["picture"]
    ]


def said_digest(path: Path) -> str:
    """Return the digest that a picture's file says, or nothing."""
    found = DIGEST.search(path.read_text())
    return found[1] if found else ""


def _panel(entry: dict[str, Any], results: Path) -> Panel:
    form = next(form for form in ("rows", "lines", "areas") if form in entry)
    read = {"rows": _row, "lines": _line, "areas": _area}[form]
    return Panel(
        form=form,
        title=entry.get("title", ""),
        x=entry.get("x", ""),
        y=entry.get("y", ""),
        is_log=entry.get("log", False),
        level=entry.get("level"),
        level_label=entry.get("level_label", ""),
        values=tuple(read(values, results) for values in entry[form]),
    )


def _row(entry: dict[str, Any], results: Path) -> Line:
    found = evaluate(entry["value"], results)
    low = evaluate(entry["low"], results) if "low" in entry else Spread((found.min,))
    high = evaluate(entry["high"], results) if "high" in entry else Spread((found.max,))
    median = statistics.median(found.values)
    return Line(entry["label"], (), (median,), low.values, high.values, entry.get("mark", ""))


def _line(entry: dict[str, Any], results: Path) -> Line:
    found = [statistics.median(evaluate(spec, results).values) for spec in entry["values"]]
    return Line(entry["label"], tuple(map(float, entry["at"])), tuple(found))


def _area(entry: dict[str, Any], results: Path) -> Line:
    at = evaluate(entry["at"], results)
    return Line(entry["label"], at.values, evaluate(entry["values"], results).values)
