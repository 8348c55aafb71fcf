"""The report's pictures."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from multi_model.client import Record
from multi_model.fleet import Samples
from multi_model.metrics import GOAL, SCALES, tpots, ttfts
from numpy.typing import NDArray

from kvcached_core.units import GIB

mpl.use("Agg")
from matplotlib import pyplot as plt

SIZE = (7.0, 3.6)


def cdfs(path: Path, title: str, records: Mapping[str, Sequence[Record]]) -> None:
    """Draw how TTFT and TPOT are distributed, a line for each mode; see `steps`."""
    figure, axes = plt.subplots(1, 2, figsize=SIZE, layout="constrained", sharey=True)
    for axis, name, values in zip(axes, ("TTFT", "TPOT"), (ttfts, tpots), strict=True):
        for mode, of_mode in records.items():
            axis.step(*steps(of_mode, values), where="post", label=mode)
        axis.set(xscale="log", xlabel=f"{name}, ms")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of requests")
    axes[0].legend()
    figure.suptitle(title)
    _save(figure, path)


def steps(
    records: Sequence[Record], values: Callable[[Sequence[Record]], list[float]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return values in ms, in order, and the share of all requests that each is the end of.

    A request that failed without a value is slower than all; one of a single token has no TPOT.
    """
    found = np.sort(np.asarray(values(records))) * 1e3
    num_lost = sum(bool(record.error) and not values([record]) for record in records)
    top = len(found) / max(len(found) + num_lost, 1)
    return found, np.linspace(0, top, len(found))


def attainments(path: Path, title: str, attained: Mapping[str, Sequence[float]]) -> None:
    """Draw the share of requests within each scale of the service level."""
    figure, axis = plt.subplots(figsize=SIZE, layout="constrained")
    for mode, of_mode in attained.items():
        axis.plot(SCALES, np.asarray(of_mode) * 100, marker=".", label=mode)
    axis.axhline(GOAL * 100, color="grey", linewidth=0.8, linestyle=":")
    axis.set(title=title, xlabel="scale of the service level", ylabel="requests within, %")
    axis.set_ylim(0, 102)
    axis.grid(alpha=0.3)
    axis.legend()
    _save(figure, path)


def memory(path: Path, title: str, samples: Samples, total_bytes: int | None) -> None:
    """Draw what each instance held, stacked, against what there is."""
    figure, axis = plt.subplots(figsize=SIZE, layout="constrained")
    held = np.asarray(samples.resident_bytes, dtype=float).T / GIB
    total = (total_bytes or max(map(sum, samples.resident_bytes))) / GIB
    axis.stackplot(samples.seconds, held, labels=samples.names, alpha=0.8)
    axis.axhline(total, color="black", linewidth=0.8, label="what there is")
    axis.set(title=title, xlabel="seconds", ylabel="KV memory, GiB")
    axis.set_ylim(0, total * 1.1)
    axis.legend(loc="upper right")
    _save(figure, path)


def rates(path: Path, title: str, records: Sequence[Record], num_models: int) -> None:
    """Draw how many requests came in each second."""
    figure, axis = plt.subplots(figsize=SIZE, layout="constrained")
    seconds = range(int(max(record.due_seconds for record in records)) + 2)
    for model in range(num_models):
        due = [record.due_seconds for record in records if record.model == model]
        axis.stairs(np.histogram(due, seconds)[0], seconds, label=f"m{model}")
    axis.set(title=f"{title}: arrivals", xlabel="seconds", ylabel="requests per second")
    axis.grid(alpha=0.3)
    axis.legend()
    _save(figure, path)


def curve(path: Path, title: str, ratios: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Draw how many times sooner elastic's first tokens come, over the peak rate of the ramp."""
    figure, axis = plt.subplots(figsize=SIZE, layout="constrained")
    for name, points in ratios.items():
        axis.plot(*zip(*points, strict=True), marker="o", label=name)
    axis.axhline(1.0, color="grey", linewidth=0.8)
    axis.set(title=title, xlabel="peak, requests per second", ylabel="static / elastic")
    axis.set_yscale("log")
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    _save(figure, path)


def _save(figure: "plt.Figure", path: Path) -> None:
    figure.savefig(path, dpi=110)
    plt.close(figure)
