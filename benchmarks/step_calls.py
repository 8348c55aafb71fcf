"""How many calls a step of vLLM's engine makes with us and without: no clock, so hardly any noise.

    python benchmarks/step_calls.py --json benchmarks/results/step_calls.json

One engine of each kind, with a tiny model on the CPU, gets the same requests at the same steps. The
interpreter counts each function that the engine's thread calls, in Python and in C: the scheduler,
the worker with its model, and what we add to both.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

from parts.machine import describe_machine
from parts.record import command_line, write

from kvcached_core.units import MIB
from kvcached_demo.harness.model import make_model

SIDES = {"vanilla": "0", "elastic": "1"}
POOL_BYTES = 256 * MIB
# By name: requests, tokens of a prompt and of an answer, steps from one request to the next.
LOADS = {"together": (8, 100, 128, 1), "arrivals": (24, 128, 64, 10)}
NUM_SHOWN = 12


class Calls:
    """Counts the calls of one thread while its block runs.

    Attributes:
        counts: How often each function was called, by `module:name`.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def __enter__(self) -> None:
        self._before = sys.getprofile()
        sys.setprofile(self._count)

    def __exit__(self, *_: object) -> None:
        sys.setprofile(self._before)

    def _count(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            code = frame.f_code
            self.counts[f"{frame.f_globals.get('__name__')}:{code.co_qualname}"] += 1
        elif event == "c_call":
            self.counts[f"C:{getattr(argument, '__qualname__', argument)}"] += 1


def engine(model: Path, *, is_elastic: bool) -> dict[str, Any]:
    """Be an engine: return the steps and the calls of each load."""
    from vllm import LLM, SamplingParams

    size = {} if is_elastic else {"kv_cache_memory_bytes": POOL_BYTES}
    llm = LLM(
        str(model),
        max_model_len=2048,
        enable_prefix_caching=False,
        seed=0,
        dtype="float32",
        enforce_eager=True,
        gpu_memory_utilization=0.3,
        **size,
    ).llm_engine
    num_asked = 0

    def play(num: int, num_in: int, num_out: int, num_steps_between: int) -> int:
        nonlocal num_asked
        sampling = SamplingParams(temperature=0, max_tokens=num_out, ignore_eos=True)
        num_left, num_steps, num_done = num, 0, 0
        while num_done < num:
            if num_left and num_steps % num_steps_between == 0:
                num_asked, num_left = num_asked + 1, num_left - 1
                prompt = {"prompt_token_ids": [3 + (7 * num_left + i) % 400 for i in range(num_in)]}
                llm.add_request(str(num_asked), prompt, sampling)
            num_done += sum(output.finished for output in llm.step())
            num_steps += 1
        return num_steps

    found = {}
    for name, load in LOADS.items():
        play(*load)  # the first time differs: an idle engine has to map its pages
        calls = Calls()
        with calls:
            num_steps = play(*load)
        found[name] = {"steps": num_steps, "calls": dict(calls.counts)}
    return found


def compare(vanilla: dict[str, Any], elastic: dict[str, Any]) -> dict[str, Any]:
    """Return the calls of a step of each, their ratio, and the functions that differ most."""
    both = {
        side: {name: number / found["steps"] for name, number in found["calls"].items()}
        for side, found in (("vanilla", vanilla), ("elastic", elastic))
    }
    names = both["vanilla"].keys() | both["elastic"].keys()
    more = {name: both["elastic"].get(name, 0.0) - both["vanilla"].get(name, 0.0) for name in names}
    most = sorted(more, key=lambda name: (-abs(more[name]), name))[:NUM_SHOWN]
    sums = {side: sum(counts.values()) for side, counts in both.items()}
    return {
        "steps": elastic["steps"],
        "calls_of_a_step": sums,
        "ratio": sums["elastic"] / sums["vanilla"],
        "differ_most": {name: more[name] for name in most},
    }


def run_engine(side: str, folder: Path) -> dict[str, Any]:
    """Run one side in a process of its own."""
    output = folder / f"{side}.json"
    environ = os.environ | {
        "ENABLE_KVCACHED": SIDES[side],
        "KVCACHED_DIR": str(folder / "kv"),
        "KVCACHED_HOST_POOL": str(POOL_BYTES),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "OMP_NUM_THREADS": "1",
    }
    words = ["--side", side, "--model", str(folder / "tiny"), "--json", str(output)]
    subprocess.run([sys.executable, __file__, *words], env=environ, check=True)
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def main() -> None:
    """Count, print a table, write JSON."""
    arguments = command_line(__doc__)
    arguments.add_argument("--side", choices=SIDES, help="be this engine")
    arguments.add_argument("--model", type=Path, help="of this model")
    options = arguments.parse_args()
    if options.side:
        found = engine(options.model, is_elastic=options.side == "elastic")
        options.json.write_text(json.dumps(found))
        sys.stdout.flush()
        os._exit(0)  # an engine in this process would take seconds to tear down
    with tempfile.TemporaryDirectory(prefix="kv-") as name:
        folder = Path(name)
        make_model(folder / "tiny", seed=1)
        sides = {side: run_engine(side, folder) for side in SIDES}
    loads = {name: compare(*(found[name] for found in sides.values())) for name in LOADS}
    results = {"machine": describe_machine(), "loads": loads}
    for name, found in loads.items():
        of_vanilla, of_ours = found["calls_of_a_step"].values()
        print(f"{name}: vanilla {of_vanilla:.1f}, elastic {of_ours:.1f}, {found['ratio']:.4f}")
        for function, more in found["differ_most"].items():
            print(f"  {more:+8.2f}  {function}")
    write(options.json, results)


if __name__ == "__main__":
    main()
