"""Where a value stands among others."""

from collections.abc import Sequence


def value_at(percent: float, values: Sequence[float]) -> float:
    """Return the value below which so many of a hundred lie."""
    ordered = sorted(values)
    return ordered[min(int(percent * len(ordered) / 100), len(ordered) - 1)]
