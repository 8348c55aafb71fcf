"""Draws the documents' pictures. The same values give the same file, byte for byte."""

from collections.abc import Iterable
from pathlib import Path

import matplotlib as mpl
from figures.picture import Line, Panel, Picture

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

WIDTH, HEIGHT = 7.6, 3.4  # inches
ROW_HEIGHT = 0.32
COLORS = ("#4477aa", "#cc6633", "#228833", "#aa3377", "#888888")
MARKERS = ("o", "s", "^", "D", "v")
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "svg.hashsalt": "kvcached",  # the names inside the file are the same each time
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": mpl.cycler(color=COLORS),
}


def draw(picture: Picture, path: Path) -> None:
    """Draw a picture into an SVG file."""
    rows = max(len(panel.values) if panel.form == "rows" else 0 for panel in picture.panels)
    size = (WIDTH, max(HEIGHT, 1.2 + ROW_HEIGHT * rows) if rows else HEIGHT)
    with mpl.rc_context(STYLE):
        figure, found = plt.subplots(
            1, len(picture.panels), figsize=size, layout="constrained", squeeze=False
        )
        for axes, panel in zip(found[0], picture.panels, strict=True):
            _panel(axes, panel)
        for axes, before, panel in zip(
            found[0][1:], picture.panels, picture.panels[1:], strict=False
        ):
            if panel.form == "rows" and _labels(panel) == _labels(before):
                axes.tick_params(labelleft=False)
        metadata = {"Date": None, "Creator": None, "Description": f"values {picture.digest}"}
        figure.savefig(path, metadata=metadata)
        plt.close(figure)


def _labels(panel: Panel) -> list[str]:
    return [line.label for line in panel.values]


def _panel(axes: Axes, panel: Panel) -> None:
    axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
    axes.grid(alpha=0.3)
    {"rows": _rows, "lines": _lines, "areas": _areas}[panel.form](axes, panel)


def _rows(axes: Axes, panel: Panel) -> None:
    marks = list(dict.fromkeys(line.mark for line in panel.values))
    for place, line in enumerate(panel.values):
        which = marks.index(line.mark)
        (median,), (low,), (high,) = line.y, line.low, line.high
        axes.errorbar(
            [median],
            [place],
            xerr=[[median - low], [high - median]],
            fmt=MARKERS[which],
            color=COLORS[which],
            capsize=3,
            label=line.mark if _is_first(panel.values, place) else None,
        )
    axes.set_yticks(range(len(panel.values)), _labels(panel))
    axes.set_ylim(len(panel.values) - 0.4, -0.6)
    if panel.is_log:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
    if panel.level is not None:
        axes.axvline(panel.level, color="grey", linewidth=0.9)
    if any(marks):
        axes.legend(loc="best")


def _is_first(lines: Iterable[Line], place: int) -> bool:
    marks = [line.mark for line in lines]
    return bool(marks[place]) and marks.index(marks[place]) == place


def _lines(axes: Axes, panel: Panel) -> None:
    for which, line in enumerate(panel.values):
        axes.plot(line.x, line.y, marker=MARKERS[which], label=line.label)
    axes.set_xticks(sorted({x for line in panel.values for x in line.x}))
    if panel.is_log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(bottom=0)
    _level(axes, panel)
    axes.legend(loc="best")


def _areas(axes: Axes, panel: Panel) -> None:
    axes.stackplot(
        panel.values[0].x,
        [line.y for line in panel.values],
        labels=_labels(panel),
        alpha=0.85,
    )
    _level(axes, panel)
    most = panel.level or max(map(sum, zip(*(line.y for line in panel.values), strict=True)))
    axes.set_ylim(0, most * 1.5)  # room for the legend
    axes.legend(loc="upper right", ncols=2)


def _level(axes: Axes, panel: Panel) -> None:
    if panel.level is not None:
        axes.axhline(panel.level, color="black", linewidth=0.9, label=panel.level_label)
