"""The summary of a run's folder, its pictures, and one page with all of it."""

import base64
import html
import itertools
import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from multi_model import metrics, plots
from multi_model.client import Record, read_records
from multi_model.fleet import Samples
from multi_model.modes import ALONE, ELASTIC, MODES, STATIC

# Below it two clients are taken to measure the same.
CROSS_CHECK_GOAL = 0.03
# At which the numbers of models are compared.
COMPARED_SCALES = (5, 10, 20)
RAMP = re.compile(r"ramp P=(\d+)")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto }
table { border-collapse: collapse; margin: 1rem 0 }
td, th { padding: .2rem .8rem; text-align: right }
th { border-bottom: 1px solid #888 } td:first-child, th:first-child { text-align: left }
img { max-width: 100% }
"""


def write_report(folder: Path) -> None:
    """Read all replays in a folder; write `summary.json`, pictures and `report.html`."""
    facts = json.loads((folder / "run.json").read_text())
    workloads = {key: fact for key, fact in facts.items() if _is_workload(fact)}
    summary: dict[str, Any] = {
        "machine": facts.get("machine"),
        "model": facts.get("model"),
        "shared": facts.get("shared"),
        "page_bytes": facts.get("page_bytes"),
        "caching": facts.get("caching"),
        "remark": facts.get("remark", ""),
        "cross_check": [_compare(found) for found in facts.get("cross_check", [])],
        "workloads": {
            key: _summarize(folder, key, fact, facts.get("pool_bytes"))
            for key, fact in workloads.items()
        },
    }
    summary["ramp"] = _ramp_curve(summary["workloads"])
    summary["models_at_99_percent"] = _num_models(summary["workloads"])
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    if summary["ramp"]:
        curves = {
            "mean TTFT": [(point["peak"], point["mean_ttft"]) for point in summary["ramp"]],
            "p99 TTFT": [(point["peak"], point["p99_ttft"]) for point in summary["ramp"]],
        }
        plots.curve(folder / "ramp.png", "ramp: how many times sooner the first token", curves)
    (folder / "report.html").write_text(_page(folder, summary))


def _is_workload(fact: Any) -> bool:
    return isinstance(fact, dict) and "num_requests" in fact


def _summarize(
    folder: Path, key: str, fact: dict[str, Any], pool_bytes: int | None
) -> dict[str, Any]:
    found = {
        mode: read_records(folder / mode / f"{key}.csv")
        for mode in MODES
        if (folder / mode / f"{key}.csv").exists()
    }
    num_models = fact["num_models"]
    levels = None
    if ALONE in found:
        levels = [
            metrics.level([record for record in found[ALONE] if record.model == model])
            for model in range(num_models)
        ]
    modes = {}
    for mode, records in found.items():
        title = f"{mode}: {fact['name']}"
        memory = _memory(folder / mode, key, title, pool_bytes)
        modes[mode] = metrics.summarize(records, levels) | memory
        if mode != ALONE:
            plots.rates(folder / f"{key}-rates.png", fact["name"], records, num_models)
        else:  # replayed one after the other: what they come to together says nothing
            for name in ("requests_per_second", "tokens_per_second", "goodput_per_second"):
                modes[mode].pop(name, None)
    if found:
        plots.cdfs(folder / f"{key}-latency.png", fact["name"], found)
    if levels is not None:
        attained = {mode: figures["attainment"] for mode, figures in modes.items()}
        plots.attainments(folder / f"{key}-attainment.png", fact["name"], attained)
    return fact | {"modes": modes, "ratios": _ratios(modes, found, levels)}


def _memory(folder: Path, key: str, title: str, pool_bytes: int | None) -> dict[str, Any]:
    facts = folder / f"{key}.json"
    found: dict[str, Any] = json.loads(facts.read_text()) if facts.exists() else {}
    path = folder / f"{key}-memory.csv"
    samples = Samples.read(path) if path.exists() else Samples([])
    if samples.seconds:
        held = [sum(row) for row in samples.resident_bytes]
        found |= {"peak_bytes": max(held), "mean_bytes": statistics.mean(held)}
        plots.memory(path.with_suffix(".png"), title, samples, pool_bytes)
    return found


def _ratios(
    modes: dict[str, Any],
    found: dict[str, list[Record]],
    levels: Sequence[metrics.Level] | None,
) -> dict[str, float | None]:
    """Return what is compared between static and elastic."""
    if STATIC not in modes or ELASTIC not in modes:
        return {}
    static, elastic = modes[STATIC], modes[ELASTIC]
    ratios: dict[str, float | None] = {}
    for figure in ("ttft_ms", "tpot_ms"):
        for which in ("mean", "p99"):
            name = f"{which}_{figure.removesuffix('_ms')}"
            if static[figure] and elastic[figure]:
                ratios[f"static_to_elastic_{name}"] = static[figure][which] / elastic[figure][which]
    scale = elastic.get("tightest_scale")
    if levels is not None and scale is not None:
        shares = [metrics.attainment(found[mode], levels, [scale])[0] for mode in (ELASTIC, STATIC)]
        ratios["attainment_elastic_to_static"] = shares[0] / shares[1] if shares[1] else None
    return ratios


def _ramp_curve(workloads: dict[str, Any]) -> list[dict[str, float]]:
    points = []
    for found in workloads.values():
        match = RAMP.fullmatch(found["name"])
        ratios = found["ratios"]
        if match and "static_to_elastic_mean_ttft" in ratios:
            points.append(
                {
                    "peak": float(match[1]),
                    "mean_ttft": ratios["static_to_elastic_mean_ttft"],
                    "p99_ttft": ratios["static_to_elastic_p99_ttft"],
                }
            )
    return sorted(points, key=lambda point: point["peak"])


def _num_models(workloads: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Return the most models of which each mode kept 99 % within a scale, for some scales."""
    best: dict[str, dict[str, int]] = {}
    for found, scale in itertools.product(workloads.values(), COMPARED_SCALES):
        of_name = best.setdefault(f"{found['name']} within {scale}x", {})
        for mode, figures in found["modes"].items():
            attained = figures.get("attainment")
            reached = bool(attained) and attained[metrics.SCALES.index(scale)] >= metrics.GOAL
            of_name[mode] = max(of_name.get(mode, 0), found["num_models"] if reached else 0)
    return best


def _compare(found: dict[str, Any]) -> dict[str, Any]:
    ours, theirs = found["ours"], found["vllm_bench_serve"]
    ratios = {name: ours[name] / theirs[name] for name in ours}
    agrees = all(abs(ratio - 1) <= CROSS_CHECK_GOAL for ratio in ratios.values())
    return found | {"ratios": ratios, "agrees": agrees}


def _page(folder: Path, summary: dict[str, Any]) -> str:
    parts = ["<h1>Several models on one device</h1>", _machine(summary)]
    if summary["ramp"]:
        parts += ["<h2>Ramp: static / elastic</h2>", _picture(folder / "ramp.png")]
    if any(len(of_name) > 1 for of_name in summary["models_at_99_percent"].values()):
        parts.append(_models_table(summary["models_at_99_percent"]))
    for key, found in summary["workloads"].items():
        parts.append(f"<h2>{html.escape(found['name'])}, {found['num_models']} models</h2>")
        parts.append(_table(found["modes"]))
        parts += [_ratio_list(found["ratios"])] if found["ratios"] else []
        pictures = sorted(folder.glob(f"{key}-*.png")) + sorted(folder.glob(f"*/{key}-*.png"))
        parts += [_picture(path) for path in pictures]
    parts.append(_cross_check(summary["cross_check"]))
    body = "\n".join(parts)
    title = "<title>kvcached: several models on one device</title>"
    return f'<!doctype html><meta charset="utf-8">{title}<style>{STYLE}</style>\n{body}\n'


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


def _table(modes: dict[str, Any]) -> str:
    head = (
        "mode",
        *("requests", "failed", "TTFT mean", "p50", "p95", "p99", "TPOT mean", "p99"),
        *(f"within {metrics.GOODPUT_SCALE}x", "99 % at", "goodput/s", "peak GiB", "kJ"),
    )
    rows = []
    for mode, found in modes.items():
        ttft, tpot = found["ttft_ms"], found["tpot_ms"]
        attained = found.get("attainment")
        place = metrics.SCALES.index(metrics.GOODPUT_SCALE)
        cells = [mode, str(found["num_requests"]), str(found["num_failed"])]
        cells += [_number(ttft.get(name)) for name in ("mean", "p50", "p95", "p99")]
        cells += [_number(tpot.get(name)) for name in ("mean", "p99")]
        cells.append(f"{attained[place]:.1%}" if attained else "")
        scale = found.get("tightest_scale")
        cells.append(f"{scale}x" if scale else "never" if attained else "")
        cells.append(_number(found.get("goodput_per_second")))
        cells.append(_number(found.get("peak_bytes"), 2**30))
        cells.append(_number(found.get("joules"), 1e3))
        rows.append(cells)
    return _html_table(head, rows)


def _models_table(best: dict[str, dict[str, int]]) -> str:
    modes = [mode for mode in MODES if any(mode in of_name for of_name in best.values())]
    rows = [[name, *(str(of.get(mode, "")) for mode in modes)] for name, of in best.items()]
    title = "<h2>The most models with 99 % of all requests within</h2>"
    return title + _html_table(("workload", *modes), rows)


def _ratio_list(ratios: dict[str, float | None]) -> str:
    rows = [[name.replace("_", " "), _number(value)] for name, value in ratios.items()]
    return _html_table(("compared", "ratio"), rows)


def _cross_check(found: list[dict[str, Any]]) -> str:
    if not found:
        return "<p>The client was not compared with <code>vllm bench serve</code> in this run.</p>"
    rows = [
        [
            f"{check['rate']:g}/s",
            *(f"{check['ours'][name]:.2f}" for name in ("mean_ttft_ms", "mean_tpot_ms")),
            *(
                f"{check['vllm_bench_serve'][name]:.2f}"
                for name in ("mean_ttft_ms", "mean_tpot_ms")
            ),
            "yes" if check["agrees"] else "no",
        ]
        for check in found
    ]
    head = ("rate", "our TTFT, ms", "TPOT", "vllm bench serve's TTFT", "TPOT", "within 3 %")
    return "<h2>Our client against vLLM's</h2>" + _html_table(head, rows)


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["".join(f"<th>{html.escape(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _number(value: float | None, unit: float = 1.0) -> str:
    return "" if value is None else f"{value / unit:.3g}"


def _picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}"></p>'
