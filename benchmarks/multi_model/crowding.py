"""First tokens beside the weights in use when their requests came: was the card too small?"""

import statistics
from collections.abc import Sequence
from typing import Any

from multi_model.client import Record

from kvcached_core.units import GIB

STEP_BYTES = 5 * GIB


def needed_bytes(records: Sequence[Record], weights_bytes: Sequence[int]) -> list[int]:
    """Return for each request the weights of all models that were in use when it came, its own too.

    Args:
        records: Of one replay.
        weights_bytes: Of each model.
    """
    spans: list[list[tuple[float, float]]] = [[] for _ in weights_bytes]
    for record in records:
        begin = record.due_seconds + record.late_seconds
        spans[record.model].append((begin, begin + (record.last_seconds or 0.0)))
    found = []
    for record in records:
        moment = record.due_seconds + record.late_seconds
        in_use = {
            model
            for model, own in enumerate(spans)
            if any(begin <= moment < end for begin, end in own)
        }
        found.append(sum(weights_bytes[model] for model in in_use | {record.model}))
    return found


def by_need(records: Sequence[Record], weights_bytes: Sequence[int]) -> list[dict[str, Any]]:
    """Return the first tokens of requests that came while at most so much was in use, by steps.

    Args:
        records: Of one replay; those that failed do not count.
        weights_bytes: Of each model.
    """
    answered = [record for record in records if record.ttft_seconds is not None]
    needs = needed_bytes(answered, weights_bytes)
    most_bytes = max(needs, default=0)
    found = []
    for up_to_bytes in range(STEP_BYTES, most_bytes + STEP_BYTES, STEP_BYTES):
        seconds = [
            record.ttft_seconds or 0.0
            for record, need in zip(answered, needs, strict=True)
            if need <= up_to_bytes
        ]
        if len(seconds) > 1:
            found.append(
                {
                    "up_to_bytes": up_to_bytes,
                    "num": len(seconds),
                    "p99_seconds": statistics.quantiles(seconds, n=100, method="inclusive")[-1],
                    "longest_seconds": max(seconds),
                }
            )
    return found
