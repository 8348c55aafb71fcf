"""What the records of a replay say: latencies, attained service levels, goodput."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from multi_model.client import Record
from parts.intervals import percentile

SCALES = tuple(range(1, 31))
PERCENTILES = (50, 95, 99)
# The scale at which goodput is told.
GOODPUT_SCALE = 5
GOAL = 0.99


@dataclass(frozen=True)
class Level:
    """The service level of a model: its own P95 when it has the device to itself, in seconds."""

    ttft_seconds: float
    tpot_seconds: float


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Return how many there are, their mean and percentiles in milliseconds.

    A percentile for which there are too few values is not in it.
    """
    if not seconds:
        return {}
    values = [value * 1e3 for value in seconds]
    found = {"num": float(len(values)), "mean": float(np.mean(values))}
    percentiles = {f"p{which}": percentile(values, which) for which in PERCENTILES}
    return found | {name: value for name, value in percentiles.items() if value is not None}


def ttfts(records: Sequence[Record]) -> list[float]:
    """Return the times to the first token of all requests that had one."""
    return [record.ttft_seconds for record in records if record.ttft_seconds is not None]


def tpots(records: Sequence[Record]) -> list[float]:
    """Return the times per token of all requests that have one."""
    return [found for record in records if (found := record.tpot_seconds) is not None]


def level(records: Sequence[Record]) -> Level:
    """Return the service level that a model's own records alone on the device set."""
    several = tpots(records)  # where all answers have one token nothing bounds the next one
    tpot_seconds = float(np.percentile(several, 95)) if several else float("inf")
    return Level(float(np.percentile(ttfts(records), 95)), tpot_seconds)


def levels(
    alone: Sequence[Record], found: Mapping[str, Sequence[Record]], num_models: int
) -> list[Level] | None:
    """Return each model's level; None where a model is asked that was not answered alone.

    Args:
        alone: What the models' own replays gave.
        found: The records of all modes.
        num_models: How many models there are; nobody may have asked some of them.
    """
    of_models: list[list[Record]] = [[] for _ in range(num_models)]
    for record in alone:
        of_models[record.model].append(record)
    answered = {model for model, records in enumerate(of_models) if ttfts(records)}
    asked = {record.model for records in found.values() for record in records}
    if not alone or asked - answered:
        return None
    unasked = Level(float("inf"), float("inf"))
    return [level(records) if ttfts(records) else unasked for records in of_models]


def is_within(record: Record, base: Level, scale: float) -> bool:
    """Return whether a request ended well and within `scale` times its model's level."""
    if record.error or record.ttft_seconds is None:
        return False
    tpot_seconds = record.tpot_seconds or 0.0
    return (
        record.ttft_seconds <= scale * base.ttft_seconds
        and tpot_seconds <= scale * base.tpot_seconds
    )


def attainment(
    records: Sequence[Record], levels: Sequence[Level], scales: Sequence[int] = SCALES
) -> list[float]:
    """Return the share of all requests, failed ones included, within each scale."""
    return [
        sum(is_within(record, levels[record.model], scale) for record in records) / len(records)
        for scale in scales
    ]


def tightest_scale(attained: Sequence[float], scales: Sequence[int] = SCALES) -> int | None:
    """Return the smallest scale at which `GOAL` is attained, or None."""
    return next(
        (scale for scale, share in zip(scales, attained, strict=True) if share >= GOAL), None
    )


def duration_seconds(records: Sequence[Record]) -> float:
    """Return how long a replay took, to its last token."""
    return max(record.due_seconds + (record.last_seconds or 0.0) for record in records)


def summarize(records: Sequence[Record], levels: Sequence[Level] | None) -> dict[str, object]:
    """Return all figures of one replay."""
    seconds = duration_seconds(records)
    completed = [record for record in records if not record.error]
    errors = sorted({record.error for record in records if record.error})
    found: dict[str, object] = {
        "num_requests": len(records),
        "num_failed": len(records) - len(completed),
        "errors": errors[:3],
        "seconds": seconds,
        "requests_per_second": len(completed) / seconds,
        "tokens_per_second": sum(record.num_tokens for record in completed) / seconds,
        "ttft_ms": spread(ttfts(records)),
        "tpot_ms": spread(tpots(records)),
        "latest_client_ms": max(record.late_seconds for record in records) * 1e3,
    }
    if levels is not None:
        attained = attainment(records, levels)
        within = attained[SCALES.index(GOODPUT_SCALE)]
        found |= {
            "attainment": attained,
            "tightest_scale": tightest_scale(attained),
            "goodput_per_second": within * len(records) / seconds,
        }
    return found
