"""How sure a figure is: bootstrap intervals, and what may be said of a bar or of a difference."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# A 99th percentile of fewer values rests on less than ten of them.
NUM_FOR_P99 = 1000
CONFIDENCE_PERCENT = 95.0
# From the least to the most of three rounds is a range that holds their median with 75 %; with four
# it is 88 %, with five 94 %.
NUM_FOR_RANGE = 5
NUM_RESAMPLES = 2000
BETTER, WORSE, NOT_TOLD_APART = "better", "worse", "not told apart"
MET, MISSED = "met", "missed"
AT_MOST, AT_LEAST = "<=", ">="


@dataclass(frozen=True)
class Interval:
    """A figure, and the range that holds the true one with 95 %.

    Attributes:
        value: The figure itself.
        low: The range's lower end, at most `value`.
        high: Its upper end, at least `value`.
    """

    value: float
    low: float
    high: float

    def overlaps(self, other: "Interval") -> bool:
        """Return whether the two ranges have a value in common."""
        return self.low <= other.high and other.low <= self.high

    def turned(self) -> "Interval":
        """Return the same of the ratio turned over: the other's divided by ours."""
        low, value, high = (
            1.0 / end if end else float("inf") for end in (self.high, self.value, self.low)
        )
        return Interval(value, low, high)


def around(value: float, resampled: Sequence[float] | NDArray[np.float64]) -> Interval:
    """Return a figure with the range that its resampled values give it."""
    tail = (100.0 - CONFIDENCE_PERCENT) / 2
    low, high = np.percentile(np.asarray(resampled, dtype=float), (tail, 100.0 - tail))
    return Interval(value, min(float(low), value), max(float(high), value))


def choices(num: int, *, seed: int = 0) -> NDArray[np.intp]:
    """Return which of `num` values each resample takes; each one takes `num`, some twice."""
    return np.random.default_rng(seed).integers(0, num, (NUM_RESAMPLES, num))


def median_interval(values: Sequence[float], *, seed: int = 0) -> Interval:
    """Return the median of values, such as the ratios of rounds, with its bootstrap interval.

    Of fewer than `NUM_FOR_RANGE` values that is their whole range, and holds it with less.

    Raises:
        ValueError: If there are no values.
    """
    if not values:
        raise ValueError("a median of no values was asked for; there has to be at least one")
    found = np.asarray(values, dtype=float)
    resampled = np.median(found[choices(len(found), seed=seed)], axis=1)
    return around(float(np.median(found)), resampled)


def median_and_interval(values: Sequence[float]) -> list[float]:
    """Return the median and the ends of its interval, as a record keeps them."""
    found = median_interval(values)
    return [found.value, found.low, found.high]


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Return a percentile, or None where there are too few values for it."""
    too_few = len(values) < NUM_FOR_P99 if percent >= 99 else not values  # noqa: PLR2004  a p99
    return None if too_few else float(np.percentile(np.asarray(values), percent))


def against_bar(found: Interval, relation: str, bar: float) -> str:
    """Return whether a bar is met: only where the whole interval is on its side.

    Args:
        found: The figure.
        relation: `<=` where the figure has to be at most the bar, `>=` where at least.
        bar: The bar.

    Raises:
        ValueError: If the relation is neither.
    """
    inside: dict[str, Callable[[float], bool]] = {
        AT_MOST: lambda value: value <= bar,
        AT_LEAST: lambda value: value >= bar,
    }
    if relation not in inside:
        raise ValueError(f"relation {relation!r} is not one of {', '.join(inside)}")
    holds = [inside[relation](end) for end in (found.low, found.high)]
    return MET if all(holds) else NOT_TOLD_APART if any(holds) else MISSED


def apart(ratio: Interval, controls: Sequence[Interval], *, is_less_better: bool) -> str:
    """Return what a ratio of ours to another's says, beside what the same thing twice says.

    A control at 1.05 says that 1.03 is noise, too: so all from 1 to a control counts as alike.

    Args:
        ratio: Ours divided by the other's, each one's first run.
        controls: What the ratio would be if both were alike: the other's second run divided by its
            first one, our first run divided by our second. Empty where nothing was run twice.
        is_less_better: Whether the figure is a time.
    """
    low = min([1.0, *(each.low for each in controls)])
    high = max([1.0, *(each.high for each in controls)])
    if ratio.overlaps(Interval(1.0, low, high)):
        return NOT_TOLD_APART
    return BETTER if (ratio.value < 1.0) == is_less_better else WORSE
