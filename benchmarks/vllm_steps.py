"""What a step costs with us and without, and nothing else: one engine of each kind, in turn.

    python benchmarks/vllm_steps.py --json benchmarks/results/vllm_steps.json

Two engines without servers get the same loads, under one lock, so that they take turns from one
second to the next and a machine that changes its speed changes it for both. The parts of a step are
timed where they run, in the engine's thread.
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from parts.record import Record
from parts.step_engine import LOADS, engine
from parts.step_kernels import print_kernels
from parts.vllm_servers import Setting, add_also, also_named, bench_run, parser

VANILLA, CONTROL = "vanilla", "control"


def steps(setting: Setting, record: Record, options: Any) -> None:
    """Compare engines, in processes that take turns: vanilla ones, one with each page size.

    A second vanilla one, the control, shows how far two processes differ that do the same.
    """
    num_pairs, loads = options.pairs, options.loads
    switches = switches_of(options)
    lock = setting.servers.workspace / "turn"
    lock.touch()
    children = {}
    for name, switch in switches.items():
        environ = os.environ | setting.environ | switch
        environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        environ["KVCACHED_DIR"] = str(setting.servers.workspace / "kv")
        command = [sys.executable, __file__, "--json", str(setting.servers.workspace / name)]
        command += ["--pairs", str(num_pairs), "--model", str(setting.model), "--lock", str(lock)]
        command += ["--num-engines", str(len(switches)), "--loads", *loads]
        command += ["--kv-gib", str(options.kv_gib)]
        command += ["--tiny"] if setting.tiny else []
        with (setting.servers.workspace / f"{name}.log").open("w") as log:
            children[name] = subprocess.Popen(command, env=environ, stdout=log, stderr=log)
    for child in children.values():
        child.wait()
    found = {name: json.loads((setting.servers.workspace / name).read_text()) for name in switches}
    for name in list(switches)[1:]:
        is_same = found[VANILLA]["tokens"] == found[name]["tokens"]
        calls = found[name]["calls"]
        record.add(**{name: {"is_same_text": is_same, "calls": calls}})
        print(f"{name}: same text {is_same}, calls {calls}", flush=True)
    for load_name in loads:
        runs = {name: found[name]["runs"][load_name] for name in switches}
        medians, ratios = compare(runs)
        record.add(**{load_name: {"vanilla": medians, "median_ratios": ratios, "runs": runs}})
        print(load_name)
        kernels = {name: found[name]["kernels"].get(load_name, {}) for name in switches}
        record.add(**{f"{load_name}, kernels of {name}": of for name, of in kernels.items()})
        for name in ratios:
            print_kernels(kernels[VANILLA], kernels[name], name)
        for figure, value in medians.items():
            shown = "  ".join(f"{name} {of_name[figure]:.4f}" for name, of_name in ratios.items())
            print(f"  {figure:40} vanilla {value:10.3f}  {shown}", flush=True)
        for name in ratios:
            for figure in ("steps with driver calls", "steps with driver calls, median us"):
                value = statistics.median(run[figure] for run in runs[name])
                print(f"  {figure:40} {name} {value:10.3f}", flush=True)


def switches_of(options: Any) -> dict[str, dict[str, str]]:
    """Return the variables of each engine, by its name."""
    vanillas = [VANILLA] if options.no_control else [VANILLA, CONTROL]
    switches = {name: {"ENABLE_KVCACHED": "0"} for name in vanillas}
    for size in options.page_sizes:
        switches[f"pages-{size}"] = {"ENABLE_KVCACHED": "1", "KVCACHED_PAGE_BYTES": size}
    for name, settings in also_named(options).items():
        switches[name] = {"ENABLE_KVCACHED": "1", **settings}
    return switches


def compare(
    runs: dict[str, list[dict[str, float]]],
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Return vanilla's median of each figure, and the others' median ratios of pairs."""
    vanilla = runs[VANILLA]
    figures = [figure for figure in vanilla[0] if all(run[figure] for run in vanilla)]
    medians = {figure: statistics.median(run[figure] for run in vanilla) for figure in figures}
    ratios = {
        name: {
            figure: statistics.median(
                own[figure] / base[figure] for own, base in zip(of_name, vanilla, strict=True)
            )
            for figure in figures
        }
        for name, of_name in runs.items()
        if name != VANILLA
    }
    return medians, ratios


def main() -> None:
    """Measure, print a table, write JSON."""
    arguments = parser(__doc__)
    arguments.add_argument("--pairs", type=int, default=8)
    arguments.add_argument("--model", type=Path, help="be an engine of this model")
    arguments.add_argument("--lock", type=Path, help="the turn that the engines take")
    arguments.add_argument("--num-engines", type=int, help="how many take turns")
    arguments.add_argument(
        "--page-sizes", nargs="+", default=["16MiB", "64MiB"], help="one elastic engine with each"
    )
    add_also(arguments)
    arguments.add_argument("--loads", nargs="+", choices=LOADS, default=list(LOADS))
    arguments.add_argument("--kv-gib", type=int, default=24, help="a vanilla engine's KV cache")
    arguments.add_argument("--no-control", action="store_true", help="leave the control out")
    options = arguments.parse_args()
    if options.model is not None:
        found = engine(options)
        options.json.write_text(json.dumps(found))
        sys.stdout.flush()
        os._exit(0)  # an engine in this process would take seconds to tear down
    with bench_run(options) as (setting, record):
        steps(setting, record, options)


if __name__ == "__main__":
    main()
