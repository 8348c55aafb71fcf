"""Logs of real requests: when they came, whom they asked, how long they were."""

import csv
import datetime as dt
import gzip
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent / "data"
ARENA = FOLDER / "arena_multimodel_trace.csv.gz"
AZURE = FOLDER / "azure2023_conv.csv.gz"


@dataclass(frozen=True)
class TraceRequest:
    """One line of a log.

    Attributes:
        at_seconds: When it came, from the first one.
        model: The model's name there.
        num_in: Tokens of its prompt, at least 1.
        num_out: Tokens of its answer, at least 1.
    """

    at_seconds: float
    model: str
    num_in: int
    num_out: int


@cache
def read_arena(path: Path = ARENA) -> tuple[TraceRequest, ...]:
    """Return the requests of 27 models of a chat arena."""
    return tuple(
        _request(float(row["arrival_s"]), row["model"], row["prompt_tokens"], row["output_tokens"])
        for row in _rows(path)
    )


@cache
def read_azure(path: Path = AZURE) -> tuple[TraceRequest, ...]:
    """Return the requests of one conversation service."""
    rows = _rows(path)
    times = [dt.datetime.fromisoformat(row["TIMESTAMP"][:26] + "+00:00") for row in rows]
    return tuple(
        _request(
            (time - times[0]).total_seconds(), "conv", row["ContextTokens"], row["GeneratedTokens"]
        )
        for time, row in zip(times, rows, strict=True)
    )


def _request(at_seconds: float, model: str, num_in: str, num_out: str) -> TraceRequest:
    return TraceRequest(at_seconds, model, max(int(num_in), 1), max(int(num_out), 1))


def _rows(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))
