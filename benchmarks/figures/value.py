"""A figure's value: picked out of a record by a path, then reduced and scaled by words.

    gpu/vllm_overhead_h100.json > 512/128 at 8 req/s > ratios > elastic > mean_tpot_ms | median

A path names a record and the keys in it. `*` stands for each item, `[key]` for those items that
have the key, `[key=value]` for those where it has the value; `and` joins several. The words behind
a bar are applied one after the other.
"""

import csv
import json
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from parts.ordered import value_at

RESULTS = Path(__file__).parents[1] / "results"
PATH_BAR, WORD_BAR = " > ", " | "
FIRST_NUMBER = re.compile(r"\d+(?:\.\d+)?")


REDUCE: dict[str, Callable[[Sequence[float]], float]] = {
    "count": len,
    "max": max,
    "mean": statistics.fmean,
    "median": statistics.median,
    "min": min,
    "p95": partial(value_at, 95),
    "p99": partial(value_at, 99),
    "sum": sum,
}
SCALE = {
    "GiB": 2.0**-30,
    "MiB": 2.0**-20,
    "percent": 100.0,
    "ms": 1e3,
    "us": 1e6,
    "thousandth": 1e-3,
}
COMBINE: dict[str, Callable[[Any, Any], float]] = {
    "per": lambda one, other: one / other,
    "less": lambda one, other: one - other,
    "same": lambda one, other: float(one == other),
}


@dataclass(frozen=True)
class Spread:
    """Values of one figure, one for each round; written as their median.

    Attributes:
        values: As they stand in the record, scaled.
    """

    values: tuple[float, ...]

    @property
    def min(self) -> float:
        """The least."""
        return min(self.values)

    @property
    def max(self) -> float:
        """The most."""
        return max(self.values)

    def __format__(self, spec: str) -> str:
        return format(statistics.median(self.values), spec)


def evaluate(spec: str, results: Path = RESULTS) -> Spread:
    """Return what a path and its words stand for.

    Raises:
        ValueError: If the record lacks a key, or a word is not known; the message says which are.
    """
    path, *words = spec.split(WORD_BAR)
    spread = Spread(tuple(pick(path, results)))
    for word in words:
        spread = _apply(spread, word, results)
    return spread


def pick(path: str, results: Path = RESULTS) -> list[Any]:
    """Return everything in a record that a path stands for; of a list, each of its items."""
    name, *keys = path.split(PATH_BAR)
    found: list[Any] = [read(results / name)]
    for key in keys:
        found = [value for item in found for value in _step(item, key, path)]
    return [value for item in found for value in (item if isinstance(item, list) else [item])]


@cache
def read(path: Path) -> Any:
    """Return a record: what a JSON file holds, or the rows of a CSV file."""
    if path.suffix == ".json":
        return json.loads(path.read_text())
    if path.suffix == ".csv":
        with path.open() as file:
            return [{k: _number(v) for k, v in row.items()} for row in csv.DictReader(file)]
    raise ValueError(f"record {str(path)!r} is neither .json nor .csv")


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _step(item: Any, key: str, path: str) -> Iterable[Any]:
    values = item.values() if isinstance(item, dict) else item
    if key == "*":
        return values
    if key.startswith("["):
        conditions = key.strip("[]").split(" and ")
        return [value for value in values if all(_meets(value, each) for each in conditions)]
    try:
        return [item[key] if isinstance(item, dict) else item[int(key)]]
    except (KeyError, IndexError, ValueError):
        there = list(item) if isinstance(item, dict) else f"{len(item)} items"
        raise ValueError(f"no {key!r} in {path!r}, but {there}") from None


def _meets(value: Any, condition: str) -> bool:
    name, is_compared, wanted = condition.partition("=")
    return name in value and (not is_compared or str(value[name]) == wanted)


def _apply(spread: Spread, word: str, results: Path) -> Spread:
    name, _, path = word.partition(" ")
    values = spread.values
    if name == "number":
        return Spread(tuple(float(FIRST_NUMBER.findall(str(value))[0]) for value in values))
    if name in REDUCE:
        return Spread((REDUCE[name](values),))
    if name in SCALE:
        return Spread(tuple(value * SCALE[name] for value in values))
    if name == "inverse":
        return Spread(tuple(1 / value for value in values))
    if name in COMBINE:
        others = pick(path, results)
        others = others * len(values) if len(others) == 1 else others
        pairs = zip(values, others, strict=True)
        return Spread(tuple(COMBINE[name](one, other) for one, other in pairs))
    known = ", ".join([*REDUCE, *SCALE, *COMBINE, "inverse", "number"])
    raise ValueError(f"word {name!r} is not one of {known}")
