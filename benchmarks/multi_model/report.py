"""The summary of a run's folder, its pictures, and one page with all of it."""

import json
from pathlib import Path

from multi_model import plots
from multi_model.page import make_page
from multi_model.summary import summarize


def write_report(folder: Path) -> None:
    """Read all replays in a folder; write `summary.json`, pictures and `report.html`."""
    summary = summarize(folder)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    curves = {
        title: [(point["peak"], point[name]) for point in summary["ramp"] if point[name]]
        for title, name in (("mean TTFT", "mean_ttft"), ("p99 TTFT", "p99_ttft"))
    }
    if summary["ramp"]:
        drawn = {title: points for title, points in curves.items() if points}
        plots.curve(folder / "ramp.png", "ramp: how many times sooner the first token", drawn)
    (folder / "report.html").write_text(make_page(folder, summary))
