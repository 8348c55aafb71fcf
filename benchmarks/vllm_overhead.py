"""vLLM's servers with us against without, on a GPU: throughput, latency, resident memory.

    python benchmarks/vllm_overhead.py --json benchmarks/results/vllm_overhead.json

One vanilla and one elastic server of the same capacity run side by side and get the same requests
in turn, from vLLM's own `vllm bench serve`. Each figure is a ratio to the vanilla run of the same
round, the median of all rounds. A second vanilla server, the control, shows the noise. With
`--starts 5` all servers start five times, and the interval is that of the five starts' medians.

    python benchmarks/vllm_overhead.py --json calm.json --also calm KVCACHED_IDLE_SECONDS=10

compares a second elastic server with other settings in the same rounds. With `--no-vanilla` the
elastic server is what the others are compared with; one that is `--also` like it is the control.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from parts.intervals import NUM_FOR_P99, NUM_FOR_RANGE, Interval, apart, median_interval
from parts.record import Record
from parts.vllm_servers import (
    FIGURES,
    PREEMPTIONS,
    QUIET_SECONDS,
    READY_SECONDS,
    Setting,
    add_also,
    also_named,
    bench_run,
    parser,
)

from kvcached_core.units import GIB

VANILLA, ELASTIC, CONTROL = "vanilla", "elastic", "control"
TIMES = frozenset(FIGURES) - {"output_throughput"}  # less of them is better

Variables = dict[str, str]


def is_elastic(name: str) -> bool:
    """Return whether a server of this name is ours."""
    return name not in (VANILLA, CONTROL)


def serve(
    setting: Setting,
    record: Record,
    names: dict[str, Variables],
    *,
    num_rounds: int,
    num_starts: int,
) -> None:
    """Compare the servers in `names`, each with its own variables."""

    def start(name: str) -> None:
        elastic, kv_bytes = is_elastic(name), setting.kv_bytes
        setting.start(name, elastic=elastic, kv_bytes=kv_bytes, **names[name])

    def count_preemptions() -> None:
        for name, server in setting.servers.by_name.items():
            preemptions[name] += server.metric(PREEMPTIONS)
        record.add(preemptions=preemptions)

    preemptions = dict.fromkeys(names, 0.0)
    record.add(variables=names)
    workloads = {label: tuple(workload) for label, *workload in setting.workloads}
    for number in range(num_starts):
        play_start(setting, record, names, start, workloads, number=number, num_rounds=num_rounds)
        count_preemptions()


def play_start(
    setting: Any,
    record: Record,
    names: Iterable[str],
    start: Callable[[str], object],
    workloads: Mapping[str, tuple[Any, ...]],
    *,
    number: int,
    num_rounds: int,
) -> None:
    """Start each server anew and play rounds of all workloads; add them to what the record has.

    A server keeps for its life what its start gave it: the cores and the memory that it landed on.
    So what all rounds of one start show can be that start's.
    """
    for name in names:
        start(name)
    begin(setting, record, next(iter(workloads.values())))
    for turn in range(number * num_rounds, (number + 1) * num_rounds):
        for label, workload in workloads.items():
            earlier = record.results.get(label, {"rounds": []})["rounds"]
            rounds = [*earlier, play_round(setting, workload, turn) | {"start": number}]
            record.add(**{label: summary(rounds, list(names))})
            print_summary(label, record.results[label], list(names))


def begin(setting: Any, record: Record, workload: tuple[Any, ...]) -> None:
    """Wait until all servers answer, say what they hold, and warm them and the client up."""
    record.add(ready_seconds=setting.servers.wait_ready(seconds=READY_SECONDS))
    start = setting.servers.view(ELASTIC)
    page_bytes = start.page_bytes
    record.add(page_bytes=page_bytes, pages_after_start=start.resident_bytes / page_bytes)
    print(f"ready: {record.results['ready_seconds']}", flush=True)
    num_in, num_out, _, num = workload
    # The first requests of a server and of the client are slow.
    for server in setting.servers.by_name.values():
        setting.bench(server, num_in, num_out, "inf", min(num, 100), seed=0)


def play_round(setting: Any, workload: Sequence[Any], number: int) -> dict[str, Any]:
    """Send a workload to each server, another one first each time; return all figures."""
    servers = setting.servers
    names = list(servers.by_name)
    turn = number % len(names)
    order = names[turn:] + names[:turn]
    figures = {n: setting.bench(servers[n], *workload, seed=number + 1) for n in order}
    time.sleep(QUIET_SECONDS)
    views = {name: servers.view(name) for name in names if is_elastic(name)}
    pages_after = views[ELASTIC].resident_bytes / views[ELASTIC].page_bytes
    mapped = {name: view.num_mapped_bytes / view.page_bytes for name, view in views.items()}
    weights = {name: view.weights_bytes for name, view in views.items()}  # those that may yield
    return figures | {
        "pages_after": pages_after,
        "mapped_so_far": mapped,
        "yielding_weights_bytes": weights,
    }


def summary(rounds: list[dict[str, Any]], names: list[str]) -> dict[str, Any]:
    """Return the rounds, each figure's ratios to the first server's, and what these say."""
    base, *others = names
    ratios = {
        name: {
            figure: [each[name][figure] / each[base][figure] for each in rounds]
            for figure in FIGURES
        }
        for name in others
    }
    intervals = {
        name: {
            figure: median_interval(_independent(values, rounds))
            for figure, values in of_name.items()
        }
        for name, of_name in ratios.items()
    }
    return {
        "median_ratio": {
            name: {figure: found.value for figure, found in of_name.items()}
            for name, of_name in intervals.items()
        },
        "intervals": {
            name: {figure: [found.low, found.high] for figure, found in of_name.items()}
            for name, of_name in intervals.items()
        },
        "said": {
            name: {figure: _said(figure, (name, base), intervals, rounds) for figure in FIGURES}
            for name in others
        },
        "ratios": ratios,
        "rounds": rounds,
    }


def _independent(ratios: Sequence[float], rounds: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return the ratios of the rounds, or of the starts where there were several."""
    by_start: dict[int, list[float]] = {}
    for ratio, each in zip(ratios, rounds, strict=True):
        by_start.setdefault(each.get("start", 0), []).append(ratio)
    return [*map(statistics.median, by_start.values())] if len(by_start) > 1 else list(ratios)


def _said(
    figure: str,
    compared: tuple[str, str],
    intervals: Mapping[str, Mapping[str, Interval]],
    rounds: Sequence[Mapping[str, Any]],
) -> str:
    """Return whether a server is better or worse than the first one, or not told apart.

    Or return why nothing can be said.
    """
    name = compared[0]
    num_failed = sum(each[one].get("failed", 0) for each in rounds for one in compared)
    if num_failed:
        return f"{num_failed:,} requests failed"
    num_values = len(_independent([0.0] * len(rounds), rounds))
    if num_values < NUM_FOR_RANGE:
        return f"needs {NUM_FOR_RANGE} rounds or starts, there were {num_values}"
    num = sum(each[name].get("completed", 0) for each in rounds)
    if figure.startswith("p99") and num < NUM_FOR_P99:
        return f"needs {NUM_FOR_P99:,} requests, there were {num:,}"
    controls = [intervals[CONTROL][figure]] if CONTROL in intervals and name != CONTROL else []
    return apart(intervals[name][figure], controls, is_less_better=figure in TIMES)


def print_summary(label: str, result: dict[str, Any], names: list[str]) -> None:
    """Print one workload's figures and ratios."""
    print(label)
    for figure, title in FIGURES.items():
        line = f"  {title:18}"
        for name in names:
            value = statistics.median(each[name][figure] for each in result["rounds"])
            line += f"  {name} {value:9.2f}"
            if name != names[0]:
                spread = result["ratios"][name][figure]
                ratio = result["median_ratio"][name][figure]
                line += f" = {ratio:.4f} ({min(spread):.4f} to {max(spread):.4f})"
                line += f", {result['said'][name][figure]}"
        print(line)
    failed = sum(each[name]["failed"] for each in result["rounds"] for name in names)
    pages = max(each["pages_after"] for each in result["rounds"])
    print(f"  failed {failed}, pages resident 2 s after {pages}", flush=True)


def main() -> None:
    """Measure, print a table, write JSON."""
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=3, help="of each start")
    arguments.add_argument("--starts", type=int, default=1, help="how often all servers start")
    arguments.add_argument("--no-control", action="store_true", help="leave the control out")
    arguments.add_argument(
        "--no-vanilla", action="store_true", help="compare elastic servers with each other"
    )
    arguments.add_argument("--kv-gib", type=int, help="KV cache of each server")
    arguments.add_argument("--num-prompts", type=int, help="requests of a workload in each round")
    add_also(arguments)
    arguments.add_argument("--only", nargs="+", help="the workloads, by parts of their names")
    options = arguments.parse_args()
    names: dict[str, Variables] = {} if options.no_vanilla else {VANILLA: {}}
    names |= {ELASTIC: {}}
    names |= {} if options.no_control or options.no_vanilla else {CONTROL: {}}
    names |= also_named(options)
    with bench_run(options) as (setting, record):
        setting.kv_bytes = options.kv_gib * GIB if options.kv_gib else setting.kv_bytes
        if options.only:
            names_of_all = [label for label, *_ in setting.workloads]
            wanted = options.only
            setting.workloads = [w for w in setting.workloads if any(o in w[0] for o in wanted)]
            if not setting.workloads:
                sys.exit(f"--only {' '.join(wanted)}: no such workload; there are {names_of_all}")
        if options.num_prompts:
            setting.workloads = [(*w[:4], options.num_prompts) for w in setting.workloads]
        serve(setting, record, names, num_rounds=options.rounds, num_starts=options.starts)


if __name__ == "__main__":
    main()
