"""What the demo leaves behind: a picture and a page."""

import base64
import html
from pathlib import Path

from matplotlib.figure import Figure

from kvcached_core.units import MIB, format_bytes
from kvcached_demo.harness.memory import Recording

COLOURS = ("#2a78d6", "#e08a2e")

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>kvcached demo</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto }}
table {{ border-collapse: collapse }} td, th {{ padding: .3rem 1rem; border-bottom: 1px solid #ddd;
text-align: left }} .short {{ color: #b00020; font-weight: 600 }} img {{ max-width: 100% }}
</style></head><body>
<h1>Two engines, one pool of {pool}</h1>
<p>{summary}</p>
<img alt="Memory of both engines over time" src="data:image/png;base64,{picture}">
<table><tr><th>what</th><th>measured</th><th>bar</th></tr>{rows}</table>
</body></html>
"""


def draw(
    recording: Recording, names: list[str], capacity_bytes: int, title: str, file: Path
) -> None:
    """Draw the engines' resident bytes over time, stacked, with the pool as a line."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplots()
    series = [[size / MIB for size in recording.resident_bytes(name)] for name in names]
    axes.stackplot(
        recording.seconds, *series, labels=names, colors=COLOURS, alpha=0.85, step="post"
    )
    axes.axhline(capacity_bytes / MIB, color="black", linewidth=1.2, label="pool")
    for seconds, name in recording.marks:
        axes.axvline(seconds, color="grey", linewidth=0.7, linestyle=":")
        axes.annotate(
            name, (seconds, capacity_bytes / MIB), (3, 4), textcoords="offset points", fontsize=8
        )
    axes.set(xlabel="seconds", ylabel="resident KV memory (MiB)")
    axes.set_ylim(0, capacity_bytes / MIB * 1.12)
    axes.set_title(f"KV memory of {title} on one pool")
    axes.legend(loc="center right", frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)


def write_page(
    rows: list[tuple[str, str, str, bool]], picture: Path, capacity_bytes: int, file: Path
) -> None:
    """Write the table and the picture into one page that needs nothing else."""
    cells = "".join(
        f"<tr><td>{html.escape(what)}</td><td{'' if is_met else ' class=short'}>"
        f"{html.escape(measured)}</td><td>{html.escape(bar)}</td></tr>"
        for what, measured, bar, is_met in rows
    )
    short = [what for what, _, _, is_met in rows if not is_met]
    summary = f"Short: {', '.join(short)}." if short else "Everything met its bar."
    file.write_text(
        PAGE.format(
            pool=format_bytes(capacity_bytes),
            summary=html.escape(summary),
            picture=base64.b64encode(picture.read_bytes()).decode(),
            rows=cells,
        )
    )
