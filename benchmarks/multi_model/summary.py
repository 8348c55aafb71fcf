"""What the replays in a run's folder come to: figures, comparisons, pictures."""

import itertools
import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from multi_model import metrics, plots
from multi_model.alike import check_schedules, unlike
from multi_model.cards import num_cards, static_needs
from multi_model.client import Record, read_records
from multi_model.compared import FIGURES, Figure, interval, ratio
from multi_model.crowding import by_need
from multi_model.fleet import Samples
from multi_model.modes import ALONE, ELASTIC, GATEWAY, MODES, OURS, STATIC, again
from parts.intervals import NOT_TOLD_APART, Interval, against_bar, apart

# Below it two clients are taken to measure the same.
CROSS_CHECK_GOAL = 0.03
# At which the numbers of models are compared.
COMPARED_SCALES = (5, 10, 20)
RAMP = re.compile(r"ramp P=(\d+)")


def summarize(folder: Path) -> dict[str, Any]:
    """Return the summary of all replays in a folder; draw their pictures into it."""
    facts = json.loads((folder / "run.json").read_text())
    workloads = {key: fact for key, fact in facts.items() if _is_workload(fact)}
    summary: dict[str, Any] = {
        "machine": facts.get("machine"),
        "model": facts.get("model"),
        "shared": facts.get("shared"),
        "page_bytes": facts.get("page_bytes"),
        "caching": facts.get("caching"),
        "remark": facts.get("remark", ""),
        "cross_check": [_compare_clients(found) for found in facts.get("cross_check", [])],
        "workloads": {
            key: _workload(folder, key, workloads, facts.get("pool_bytes")) for key in workloads
        },
    }
    summary["ramp"] = _ramp_curve(summary["workloads"])
    summary["models_at_99_percent"] = _num_models(summary["workloads"])
    return summary


def _is_workload(fact: Any) -> bool:
    return isinstance(fact, dict) and "num_requests" in fact


def _workload(
    folder: Path, key: str, workloads: dict[str, Any], pool_bytes: int | None
) -> dict[str, Any]:
    fact = workloads[key]
    found = {
        mode: read_records(folder / mode / f"{key}.csv")
        for mode in [*MODES, *map(again, MODES)]
        if (folder / mode / f"{key}.csv").exists()
    }
    check_schedules(key, found)
    levels, levels_of = metrics.levels(found.get(ALONE, []), found, fact["num_models"]), key
    if levels is None:
        levels, levels_of = _levels_of_another(folder, fact, workloads)
    modes = {}
    for mode, records in found.items():
        title = f"{mode}: {fact['name']}"
        memory = _memory(folder / mode, key, title, pool_bytes)
        modes[mode] = metrics.summarize(records, levels) | memory
        if mode != ALONE:
            plots.rates(folder / f"{key}-rates.png", fact["name"], records, fact["num_models"])
        else:  # replayed one after the other: what they come to together says nothing
            for name in ("requests_per_second", "tokens_per_second", "goodput_per_second"):
                modes[mode].pop(name, None)
    if found:
        plots.cdfs(folder / f"{key}-latency.png", fact["name"], found)
    if levels is not None:
        attained = {mode: figures["attainment"] for mode, figures in modes.items()}
        plots.attainments(folder / f"{key}-attainment.png", fact["name"], attained)
    return fact | {
        "levels_of": levels_of if levels else None,
        "modes": modes,
        "unlike": unlike({mode: figures.get("settings", {}) for mode, figures in modes.items()}),
        "ratios": _ratios(modes, found, levels),
        "compared": _compared(found, levels, fact.get("bars", [])),
        "held_to_bars": _held_to_bars(found, levels, fact.get("bars", [])),
        "cards_of_static": {
            mode: _cards(fact, figures["peak_bytes_of_models"])
            for mode, figures in modes.items()
            if mode in OURS and "peak_bytes_of_models" in figures and "weights_bytes" in fact
        },
        "crowding": {
            mode: by_need(records, fact["weights_bytes"])
            for mode, records in found.items()
            if mode in {GATEWAY, again(GATEWAY)} and "weights_bytes" in fact
        },
    }


def _levels_of_another(
    folder: Path, fact: dict[str, Any], workloads: dict[str, Any]
) -> tuple[list[metrics.Level] | None, str]:
    """Return the level of the same load on another number of models, and which that is.

    Where all models have one shape, one that runs alone does not know how many there are.
    """
    shapes = set(fact.get("weights_bytes", []))
    if len(shapes) != 1:
        return None, ""
    for key, other in workloads.items():
        alone = folder / ALONE / f"{key}.csv"
        is_like = other["name"] == fact["name"] and set(other.get("weights_bytes", [])) == shapes
        if is_like and alone.exists():
            return [metrics.level(read_records(alone))] * fact["num_models"], key
    return None, ""


def _memory(folder: Path, key: str, title: str, pool_bytes: int | None) -> dict[str, Any]:
    facts = folder / f"{key}.json"
    found: dict[str, Any] = json.loads(facts.read_text()) if facts.exists() else {}
    path = folder / f"{key}-memory.csv"
    samples = Samples.read(path) if path.exists() else Samples([])
    if any(map(any, samples.resident_bytes)):
        held = [sum(row) for row in samples.resident_bytes]
        found |= {"peak_bytes": max(held), "mean_bytes": statistics.mean(held)}
        found["peak_bytes_of_models"] = list(map(max, zip(*samples.resident_bytes, strict=True)))
        plots.memory(path.with_suffix(".png"), title, samples, pool_bytes)
    return found


def _cards(fact: dict[str, Any], kv_bytes: Sequence[int]) -> int | None:
    """Return how many cards a split would need for what the models held here."""
    return num_cards(static_needs(fact["weights_bytes"], kv_bytes), fact["card_bytes"])


def _held_to_bars(
    found: dict[str, list[Record]],
    levels: Sequence[metrics.Level] | None,
    bars: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Return our modes' figures that have a bar of their own, with what may be said of it."""
    made = []
    for mode, bar in itertools.product(OURS, bars):
        if mode in found and not bar["other"]:
            figure = FIGURES[bar["figure"]]
            value = figure.total(figure.of(found[mode], levels))
            around = interval(figure, found[mode], levels)
            said = against_bar(around, bar["relation"], bar["value"]) if around else NOT_TOLD_APART
            made.append(
                {
                    "figure": figure.name,
                    "ours": mode,
                    "value": value,
                    "interval": asdict(around) if around else None,
                    "bar": {"words": f"{bar['relation']} {bar['value']:g}", "said": said},
                }
            )
    return made


def _compared(
    found: dict[str, list[Record]],
    levels: Sequence[metrics.Level] | None,
    bars: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Return each figure of our modes beside each other mode's, with what may be said of it."""
    pairs = [
        (ours, other)
        for ours in OURS
        for other in MODES
        if ours in found and other in found and other not in {ours, ALONE}
    ]
    controls = {
        (mode, name): ratio(figure, found[again(mode)], found[mode], levels)
        for mode in MODES
        if again(mode) in found
        for name, figure in FIGURES.items()
    }
    made = []
    for (ours, other), figure in itertools.product(pairs, FIGURES.values()):
        of_modes = [figure.of(found[mode], levels) for mode in (ours, other)]
        if figure.is_of_conversations and not any(of_modes):
            continue
        values = [figure.total(each) for each in of_modes]
        between = ratio(figure, found[ours], found[other], levels)
        of_other, of_ours = (controls.get((mode, figure.name)) for mode in (other, ours))
        control = of_other or of_ours
        made.append(
            {
                "figure": figure.name,
                "ours": ours,
                "other": other,
                "values": values,
                "num_failed": [sum(bool(each.error) for each in found[m]) for m in (ours, other)],
                "ratio": asdict(between) if between else None,
                "control": asdict(control) if control else None,
                "said": _said(figure, between, of_other, of_ours),
                "bar": _bar(bars, figure, other, between),
            }
        )
    return made


def _said(
    figure: Figure, between: Interval | None, of_other: Interval | None, of_ours: Interval | None
) -> str:
    """Return what a ratio says beside the second runs of the two modes, each divided by its first.

    Ours counts turned over: our second run beside the other's is our first one's ratio times it.
    """
    if between is None:
        return NOT_TOLD_APART
    controls = [*filter(None, (of_other, of_ours and of_ours.turned()))]
    return apart(between, controls, is_less_better=figure.is_less_better)


def _bar(
    bars: Sequence[dict[str, Any]], figure: Figure, other: str, between: Interval | None
) -> dict[str, Any] | None:
    for bar in bars:
        if (bar["figure"], bar["other"]) == (figure.name, other):
            said = NOT_TOLD_APART
            if between is not None:
                said = against_bar(between, bar["relation"], bar["value"])
            return {"words": f"{bar['relation']} {bar['value']:g}", "said": said}
    return None


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
    for figure, which in itertools.product(("ttft_ms", "tpot_ms"), ("mean", "p99")):
        if which in static[figure] and elastic[figure].get(which):
            name = f"{which}_{figure.removesuffix('_ms')}"
            ratios[f"static_to_elastic_{name}"] = static[figure][which] / elastic[figure][which]
    scale = elastic.get("tightest_scale")
    if levels is not None and scale is not None:
        shares = [metrics.attainment(found[mode], levels, [scale])[0] for mode in (ELASTIC, STATIC)]
        ratios["attainment_elastic_to_static"] = shares[0] / shares[1] if shares[1] else None
    return ratios


def _ramp_curve(workloads: dict[str, Any]) -> list[dict[str, float | None]]:
    points = [
        {
            "peak": float(match[1]),
            "mean_ttft": found["ratios"]["static_to_elastic_mean_ttft"],
            "p99_ttft": found["ratios"].get("static_to_elastic_p99_ttft"),
        }
        for found in workloads.values()
        if (match := RAMP.fullmatch(found["name"]))
        and "static_to_elastic_mean_ttft" in found["ratios"]
    ]
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


def _compare_clients(found: dict[str, Any]) -> dict[str, Any]:
    ours, theirs = found["ours"], found["vllm_bench_serve"]
    ratios = {name: ours[name] / theirs[name] for name in ours}
    agrees = all(abs(ratio - 1) <= CROSS_CHECK_GOAL for ratio in ratios.values())
    return found | {"ratios": ratios, "agrees": agrees}
