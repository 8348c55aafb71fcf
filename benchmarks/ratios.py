"""What the ratios of several rounds say together."""

import statistics


def median_and_interval(values: list[float]) -> list[float]:
    """Return the median, and the range that holds the true one with 95 % (order statistics)."""
    ordered = sorted(values)
    reach = 0.98 * len(ordered) ** 0.5  # 1.96 standard deviations of a rank around the median
    low = max(int((len(ordered) - 1) / 2 - reach), 0)
    high = min(-int(-(len(ordered) - 1) / 2 - reach), len(ordered) - 1)
    return [statistics.median(ordered), ordered[low], ordered[high]]
