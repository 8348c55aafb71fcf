"""What a simulated day is measured by."""

import statistics
from collections import Counter
from dataclasses import dataclass, field

HOURS = 24


@dataclass
class Tally:
    """Counts by hour, and times.

    Attributes:
        hours: For each hour how often each thing was.
        ttft_seconds: Times to the first token, by what the request found.
        decisions_ms: The processor's time of each decision, by its kind.
    """

    hours: list[Counter[str]] = field(default_factory=lambda: [Counter() for _ in range(HOURS)])
    ttft_seconds: dict[str, list[float]] = field(default_factory=dict)
    decisions_ms: dict[str, list[float]] = field(default_factory=dict)

    def count(self, what: str, now: float, num: int = 1) -> None:
        """Count something in its hour; what ends after the day belongs to its last hour."""
        self.hours[min(int(now // 3_600), HOURS - 1)][what] += num

    def answered(
        self, found: str, arrival: float, ttft_seconds: float, goal_seconds: float
    ) -> None:
        """Count a request by the hour in which it came."""
        self.ttft_seconds.setdefault(found, []).append(ttft_seconds)
        self.count("answered", arrival)
        self.count(f"found {found}", arrival)
        if ttft_seconds <= goal_seconds:
            self.count("in time", arrival)

    def decided(self, kind: str, milliseconds: float) -> None:
        """Note what a decision took."""
        self.decisions_ms.setdefault(kind, []).append(milliseconds)

    def report(self) -> dict[str, object]:
        """Return all of it as plain values."""
        total: Counter[str] = sum(self.hours, Counter())
        calm = sum(self.hours[1:], Counter())
        moves = [hour["moves"] for hour in self.hours if hour["requests"]]
        return {
            "total": dict(total),
            "attainment": total["in time"] / max(total["answered"], 1),
            "attainment_after_first_hour": calm["in time"] / max(calm["answered"], 1),
            "moves_per_hour": {"median": statistics.median(moves), "max": max(moves)},
            "ttft_seconds": {name: spread(all_) for name, all_ in self.ttft_seconds.items()},
            "decision_ms": {name: spread(all_) for name, all_ in self.decisions_ms.items()},
            "hours": [dict(hour) for hour in self.hours],
        }


def spread(values: list[float]) -> dict[str, float]:
    """Return how many there are, their median and tails."""
    if len(values) < 2:  # noqa: PLR2004  fewer have no quantiles
        values = [*values, *values]
        return {"number": 1, "p50": values[0], "p99": values[0], "max": values[0]}
    cuts = statistics.quantiles(values, n=100)
    return {"number": len(values), "p50": cuts[49], "p99": cuts[98], "max": max(values)}
