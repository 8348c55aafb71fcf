"""The report of a run as one HTML page: a summary first, and what is long folded."""

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from multi_model import metrics
from multi_model.compared import FIGURES
from multi_model.wording import number, ratio
from parts.intervals import NUM_FOR_P99

from kvcached_core.units import format_bytes

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 940px; margin: 2rem auto; padding: 0 10px;
       overflow-wrap: anywhere }
table { border-collapse: collapse; margin: 1rem 0; max-width: 100% }
td, th { padding: .15rem .5rem; text-align: right; vertical-align: top }
th { border-bottom: 1px solid #888 } td:first-child, th:first-child { text-align: left }
img { max-width: 100% } summary { cursor: pointer; font-weight: 600; margin: .6rem 0 }
"""
# What the summary has of all that is compared.
OPENING = ("mean_ttft", "p99_ttft", "attained")
# Figures of the table of modes: title, the place in a mode's figures, unit, what it is divided by.
ROWS = (
    ("requests", ("num_requests",), "", 1.0),
    ("failed", ("num_failed",), "", 1.0),
    ("TTFT mean", ("ttft_ms", "mean"), "ms", 1.0),
    ("TTFT median", ("ttft_ms", "p50"), "ms", 1.0),
    ("TTFT p95", ("ttft_ms", "p95"), "ms", 1.0),
    ("TTFT p99", ("ttft_ms", "p99"), "ms", 1.0),
    ("TPOT mean", ("tpot_ms", "mean"), "ms", 1.0),
    ("TPOT p99", ("tpot_ms", "p99"), "ms", 1.0),
    ("tokens a second", ("tokens_per_second",), "", 1.0),
    ("goodput, requests/s", ("goodput_per_second",), "", 1.0),
    ("KV memory at most", ("peak_bytes",), "GiB", 2.0**30),
    ("energy", ("joules",), "kJ", 1e3),
    ("turns", ("num_turns",), "", 1.0),
    ("weights came back", ("num_activations",), "", 1.0),
    ("that took, together", ("activation_seconds",), "s", 1.0),
    ("loaded from host tiers", ("loaded_bytes",), "GiB", 2.0**30),
    ("device in use before", ("idle_device_bytes",), "GiB", 2.0**30),
    ("device in use after", ("after_device_bytes",), "GiB", 2.0**30),
)


def make_page(folder: Path, summary: dict[str, Any]) -> str:
    """Return the page of a run; its pictures are in it."""
    parts = ["<h1>Several models on one device</h1>", _opening(summary)]
    parts += [_workload(folder, key, found) for key, found in summary["workloads"].items()]
    most = summary["models_at_99_percent"]
    if any(len(of_name) > 1 for of_name in most.values()):
        parts.append(_folded("The most models with 99 % of all requests in time", _most(most)))
    if summary["ramp"]:
        parts.append(_folded("Ramp: static / elastic", _picture(folder / "ramp.png")))
    parts += [_folded("Our client against vLLM's", _cross_check(summary["cross_check"]))]
    parts += [_folded("The machine", _machine(summary))]
    body = "\n".join(parts)
    title = "<title>kvcached: several models on one device</title>"
    return f'<!doctype html><meta charset="utf-8">{title}<style>{STYLE}</style>\n{body}\n'


def _opening(summary: dict[str, Any]) -> str:
    """Return what a reader should know who reads nothing else."""
    rows = [
        [f"{found['name']}, {found['num_models']} models", *_cells(line)]
        for found in summary["workloads"].values()
        for line in found["compared"]
        if line["figure"] in OPENING and line["values"] != [None, None]
    ]
    failed = sum(
        figures["num_failed"]
        for found in summary["workloads"].values()
        for figures in found["modes"].values()
    )
    words = (
        f"<h2>Summary</h2><p>{number(failed)} requests failed. A ratio is ours divided by the"
        " other's, with the range that holds it with 95 %. <em>Not told apart</em>: that range has"
        " 1 in it, or a value between 1 and what the same mode run twice gave, or there is no"
        " range.</p>"
    )
    lines = [line for found in summary["workloads"].values() for line in found["compared"]]
    if not any(line["control"] for line in lines):
        words += "<p>No mode was run twice: what one run differs from the next is unknown.</p>"
    head = ("workload", "ours", "other", "figure", "ours", "other's", "ratio", "said", "bar")
    words += "".join(
        f"<p>{html.escape(found['name'])}, {found['num_models']} models: a model alone is that of"
        f" {html.escape(found['levels_of'])}.</p>"
        for key, found in summary["workloads"].items()
        if found["levels_of"] not in {key, None}
    )
    words += "".join(
        f"<p><strong>{html.escape(found['name'])}: modes had different settings.</strong>"
        f" {html.escape('; '.join(found['unlike']))}</p>"
        for found in summary["workloads"].values()
        if found["unlike"]
    )
    table = _html_table(head, rows) if rows else "<p>No two modes were compared.</p>"
    return words + table + "".join(map(_own_bars, summary["workloads"].values()))


def _own_bars(found: dict[str, Any]) -> str:
    """Return what a workload's figures say that have a bar of their own, and what static needs."""
    rows = [
        [line["ours"], FIGURES[line["figure"]].title, *_own_cells(line)]
        for line in found["held_to_bars"]
    ]
    cards = [
        f"<p>{html.escape(found['name'])}: with what the models held in mode {mode}, an even split"
        f" {'has a model that no card holds' if num is None else f'needs {num} such cards'}.</p>"
        for mode, num in found["cards_of_static"].items()
    ]
    head = (found["name"], "figure", "value", "with 95 %", "bar", "said")
    return (_html_table(head, rows) if rows else "") + "".join(cards)


def _own_cells(line: dict[str, Any]) -> list[str]:
    figure = FIGURES[line["figure"]]
    value = number(line["value"], figure.unit) or f"needs {figure.num_needed:,}"
    around = line["interval"]
    ends = [number(around[end], figure.unit) for end in ("low", "high")] if around else []
    return [value, " to ".join(ends), line["bar"]["words"], line["bar"]["said"]]


def _cells(line: dict[str, Any]) -> list[str]:
    figure = FIGURES[line["figure"]]
    values = [number(value, figure.unit) for value in line["values"]]
    if None in line["values"] and figure.num_needed > 1:
        values = [value or f"needs {figure.num_needed:,}" for value in values]
    if figure.is_less_better:  # a time: only the requests that had an answer have one
        values = [
            f"{value}, {number(num)} failed" if num else value
            for value, num in zip(values, line["num_failed"], strict=True)
        ]
    between = ratio(line["ratio"]) if line["ratio"] else ""
    bar = f"{line['bar']['words']}: {line['bar']['said']}" if line["bar"] else ""
    return [line["ours"], line["other"], figure.title, *values, between, line["said"], bar]


def _workload(folder: Path, key: str, found: dict[str, Any]) -> str:
    title = f"{found['name']}, {found['num_models']} models"
    pictures = sorted(folder.glob(f"{key}-*.png")) + sorted(folder.glob(f"*/{key}-*.png"))
    parts = [_modes_table(found["modes"])]
    if found["compared"]:
        head = ("ours", "other", "figure", "ours", "other's", "ratio", "said", "bar")
        parts.append(_html_table(head, [_cells(line) for line in found["compared"]]))
    parts += [_crowding(mode, lines) for mode, lines in found["crowding"].items()]
    parts += [_picture(path) for path in pictures]
    return _folded(title, "\n".join(parts))


def _crowding(mode: str, lines: Sequence[dict[str, Any]]) -> str:
    """Return how soon first tokens came beside how much was in use then."""
    head = ("weights in use", "requests", "99 % of first tokens within", "all within")
    rows = [
        [
            f"{mode}: up to {format_bytes(line['up_to_bytes'])}",
            number(line["num"]),
            number(line["p99_seconds"], "ms", 1e-3),
            number(line["longest_seconds"], "ms", 1e-3),
        ]
        for line in lines
    ]
    return _html_table(head, rows)


def _modes_table(modes: dict[str, Any]) -> str:
    rows = []
    for title, place, unit, scale in ROWS:
        cells = [number(_at(figures, place), unit, scale) for figures in modes.values()]
        if place[-1] == "p99":
            cells = [cell or f"needs {NUM_FOR_P99:,}" for cell in cells]
        if any(cells):
            rows.append([title, *cells])
    attained = [figures.get("attainment") for figures in modes.values()]
    if any(attained):
        which = metrics.SCALES.index(metrics.GOODPUT_SCALE)
        cells = [f"{shares[which]:.1%}" if shares else "" for shares in attained]
        rows.append([f"within {metrics.GOODPUT_SCALE}x", *cells])
        scales = [figures.get("tightest_scale") for figures in modes.values()]
        rows.append(["99 % within", *(f"{scale}x" if scale else "never" for scale in scales)])
    return _html_table(("figure", *modes), rows)


def _at(figures: dict[str, Any], place: Sequence[str]) -> float | None:
    found: Any = figures
    for name in place:
        found = found.get(name) if found else None
    return found


def _most(best: dict[str, dict[str, int]]) -> str:
    modes = list(dict.fromkeys(mode for of_name in best.values() for mode in of_name))
    rows = [[name, *(str(of.get(mode, "")) for mode in modes)] for name, of in best.items()]
    return _html_table(("workload", *modes), rows)


def _machine(summary: dict[str, Any]) -> str:
    machine = summary["machine"] or {}
    words = [f"{name}: {value}" for name, value in machine.items() if name != "versions"]
    words += [f"{name} {value}" for name, value in machine.get("versions", {}).items()]
    words += [
        f"model: {summary['model']}",
        f"shared: {summary['shared']}",
        f"pages: {summary['page_bytes']}",
        f"prefix caching: {summary['caching']}",
        summary["remark"],
    ]
    return f"<p>{html.escape('; '.join(filter(None, words)))}</p>"


def _cross_check(found: list[dict[str, Any]]) -> str:
    if not found:
        return "<p>The client was not compared with <code>vllm bench serve</code> in this run.</p>"
    names = ("mean_ttft_ms", "mean_tpot_ms")
    rows = [
        [
            f"{check['rate']:g}/s",
            *(number(check["ours"][name], "ms") for name in names),
            *(number(check["vllm_bench_serve"][name], "ms") for name in names),
            "yes" if check["agrees"] else "no",
        ]
        for check in found
    ]
    head = ("rate", "our TTFT", "TPOT", "vllm bench serve's TTFT", "TPOT", "within 3 %")
    return _html_table(head, rows)


def _html_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["".join(f"<th>{html.escape(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _folded(title: str, body: str) -> str:
    return f"<details><summary>{html.escape(title)}</summary>\n{body}\n</details>"


def _picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}"></p>'
