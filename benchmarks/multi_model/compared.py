"""Figures of replays, and two replays of one schedule beside each other, with their intervals.

Requests that come close together share their luck, so what is drawn again is not requests but
windows of the schedule, the same ones of both replays.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from multi_model.client import Record
from multi_model.metrics import GOODPUT_SCALE, Level, is_within
from numpy.typing import NDArray
from parts.intervals import NUM_FOR_P99, Interval, around, choices

WINDOW_SECONDS = 3.0
# Fewer windows say nothing of what others would have said.
MIN_WINDOWS = 8
NUM_PERCENTILE_RESAMPLES = 500  # each one sorts


@dataclass(frozen=True)
class Figure:
    """What is compared.

    Attributes:
        name: What a bar calls it, and the summary.
        title: What the report calls it.
        unit: `ms` or `%`.
        value: Returns a request's own value; None leaves it out.
        percent: The percentile that is compared; None compares means.
        num_needed: How many values both replays have to have.
        is_less_better: Whether it is a time.
        is_of_conversations: Whether other schedules have nothing of it.
    """

    name: str
    title: str
    unit: str
    value: Callable[[Record, Sequence[Level] | None], float | None]
    percent: float | None = None
    num_needed: int = 1
    is_less_better: bool = True
    is_of_conversations: bool = False

    def of(self, records: Sequence[Record], levels: Sequence[Level] | None) -> list[float]:
        """Return the requests' values."""
        return [found for record in records if (found := self.value(record, levels)) is not None]

    def total(self, values: Sequence[float]) -> float | None:
        """Return what the values come to, or None where they are too few."""
        if len(values) < self.num_needed:
            return None
        found = np.asarray(values)
        return float(found.mean() if self.percent is None else np.percentile(found, self.percent))


def _ttft(record: Record, _levels: Sequence[Level] | None) -> float | None:
    return None if record.ttft_seconds is None else record.ttft_seconds * 1e3


def _ttft_again(record: Record, levels: Sequence[Level] | None) -> float | None:
    return _ttft(record, levels) if record.turn else None


def _tpot(record: Record, _levels: Sequence[Level] | None) -> float | None:
    return None if record.tpot_seconds is None else record.tpot_seconds * 1e3


def _attained(record: Record, levels: Sequence[Level] | None) -> float | None:
    if levels is None:
        return None
    return 100.0 * is_within(record, levels[record.model], GOODPUT_SCALE)


FIGURES = {
    figure.name: figure
    for figure in (
        Figure("mean_ttft", "mean TTFT", "ms", _ttft),
        Figure("p50_ttft", "median TTFT", "ms", _ttft, 50),
        Figure("p99_ttft", "p99 TTFT", "ms", _ttft, 99, NUM_FOR_P99),
        *(
            replace(figure, value=_ttft_again, is_of_conversations=True)
            for figure in (
                Figure("mean_ttft_again", "mean TTFT of later turns", "ms", _ttft),
                Figure("p99_ttft_again", "p99 TTFT of later turns", "ms", _ttft, 99, NUM_FOR_P99),
            )
        ),
        Figure("mean_tpot", "mean TPOT", "ms", _tpot),
        Figure("p99_tpot", "p99 TPOT", "ms", _tpot, 99, NUM_FOR_P99),
        Figure("attained", f"within {GOODPUT_SCALE}x", "%", _attained, is_less_better=False),
    )
}


def ratio(
    figure: Figure,
    ours: Sequence[Record],
    others: Sequence[Record],
    levels: Sequence[Level] | None = None,
) -> Interval | None:
    """Return our figure divided by the others', with its interval over the schedule's windows.

    None where either has too few values or none above zero, or the schedule too few windows.
    """
    totals = [figure.total(figure.of(records, levels)) for records in (ours, others)]
    if totals[0] is None or not totals[1]:
        return None
    found = [_by_window(figure, records, levels) for records in (ours, others)]
    keys = sorted(found[0].keys() & found[1].keys())
    if len(keys) < MIN_WINDOWS:
        return None
    drawn = choices(len(keys))
    ours_again, others_again = (
        _resampled(figure, [windows[key] for key in keys], drawn) for windows in found
    )
    usable = np.isfinite(ours_again) & (others_again > 0)
    if not usable.any():
        return None
    return around(totals[0] / totals[1], ours_again[usable] / others_again[usable])


def interval(
    figure: Figure, records: Sequence[Record], levels: Sequence[Level] | None = None
) -> Interval | None:
    """Return one replay's figure with its interval; None where values or windows are too few."""
    total = figure.total(figure.of(records, levels))
    windows = list(_by_window(figure, records, levels).values())
    if total is None or len(windows) < MIN_WINDOWS:
        return None
    return around(total, _resampled(figure, windows, choices(len(windows))))


def _by_window(
    figure: Figure, records: Sequence[Record], levels: Sequence[Level] | None
) -> dict[int, list[float]]:
    windows: dict[int, list[float]] = defaultdict(list)
    for record in records:
        value = figure.value(record, levels)
        if value is not None:
            windows[int(record.due_seconds / WINDOW_SECONDS)].append(value)
    return windows


def _resampled(
    figure: Figure, windows: Sequence[list[float]], drawn: NDArray[np.intp]
) -> NDArray[np.float64]:
    if figure.percent is None:
        sums, counts = (np.array([count(window) for window in windows]) for count in (sum, len))
        means: NDArray[np.float64] = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
        return means
    return _percentiles(windows, drawn[:NUM_PERCENTILE_RESAMPLES], figure.percent)


def _percentiles(
    windows: Sequence[list[float]], drawn: NDArray[np.intp], percent: float
) -> NDArray[np.float64]:
    """Return what `numpy.percentile` says of the values of each drawing; they are sorted once."""
    values = np.concatenate(windows)
    order = np.argsort(values)
    values = values[order]
    owners = np.repeat(np.arange(len(windows)), [len(window) for window in windows])[order]
    lows, highs, parts = np.empty((3, len(drawn)))
    for number, places in enumerate(drawn):
        ends = np.bincount(places, minlength=len(windows))[owners].cumsum()
        last = int(ends[-1]) - 1
        below, parts[number] = divmod(last * (percent / 100), 1)
        ranks = [below, min(below + 1, last)]
        lows[number], highs[number] = values[np.searchsorted(ends, ranks, side="right")]
    gaps = highs - lows
    is_nearer_low = parts < 0.5  # noqa: PLR2004  the middle; numpy rounds from the nearer end, too
    return np.where(is_nearer_low, lows + gaps * parts, highs - gaps * (1 - parts))
