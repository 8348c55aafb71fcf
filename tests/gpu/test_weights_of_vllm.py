"""Real vLLM engines on the GPU whose weights are given and come back: the tokens stay."""

import json
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from helpers.gpu_engine import run_engine

from kvcached_core.units import MIB

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

SCRIPT = Path(__file__).parents[1] / "helpers" / "gpu_weights.py"
NUM_AT_ONCE = int(os.environ.get("GPU_CHECK_ENGINES", "5"))
EAGER = {"engine": {"enforce_eager": True}}

# A shape, vLLM's model runner, and what the script gets.
CASES: dict[str, tuple[str, int | None, dict[str, Any]]] = {
    "8B V1 graphs": ("llama-8b", 1, {}),
    "8B V2 graphs": ("llama-8b", 2, {}),
    "8B eager": ("llama-8b", None, EAGER),
    "8B fp8": ("llama-8b", None, {"engine": {"enforce_eager": True, "quantization": "fp8"}}),
    "awq": ("awq", None, EAGER),
    "gptq": ("gptq", None, EAGER),
    "tied": ("llama-1b", None, EAGER),
    "mla": ("mla", None, EAGER),
    "sinks": ("sinks", None, EAGER),
    "sliding": ("sliding", None, EAGER),
    "linear": (
        "linear",
        None,
        {"engine": {"enforce_eager": True, "gdn_prefill_backend": "triton"}},
    ),
    "mamba": ("mamba", None, EAGER),
    "experts": ("moe-20g", None, EAGER),
    "lora": (
        "llama-small",
        None,
        {"engine": {"enforce_eager": True, "enable_lora": True}, "lora": True},
    ),
    "8B V1 layers": ("llama-8b", 1, {}),
    "8B V2 layers": ("llama-8b", 2, {}),
    "mla layers": ("mla", None, EAGER),
    "linear layers": (
        "linear",
        None,
        {"engine": {"enforce_eager": True, "gdn_prefill_backend": "triton"}},
    ),
}
# Of which each layer waits for its own weights.
LAYERS = {name for name in CASES if name.endswith(" layers")}

# Of which the weights of linear layers have four bits: what all take at most, half of bfloat16's.
PACKED_BYTES = {"awq": 216 * MIB, "gptq": 216 * MIB}


class Runs:
    """Engines in processes of their own: each case as vanilla and as ours, some at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pool = ThreadPoolExecutor(NUM_AT_ONCE)
        self._futures: dict[tuple[str, bool], Future[Any]] = {}

    def start(self, name: str) -> None:
        for elastic in (False, True):
            self._futures[name, elastic] = self._pool.submit(self._run, name, elastic=elastic)

    def reports(self, name: str) -> tuple[Any, Any]:
        return self._futures[name, False].result(), self._futures[name, True].result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _run(self, name: str, *, elastic: bool) -> Any:
        shape, runner, options = CASES[name]
        label = f"{name} {'ours' if elastic else 'vanilla'}".replace(" ", "-")
        own = {"DUMMY_SEED": "1"} | ({"KVCACHED_WEIGHTS": "yield"} if elastic else {})
        if elastic and name in LAYERS:
            own["KVCACHED_WEIGHTS_WAIT"] = "layers"
        report = run_engine(
            SCRIPT, self.folder / label, shape, options, own, elastic=elastic, runner=runner
        )
        brief = {key: value for key, value in report.items() if not isinstance(value, list)}
        (self.folder / f"{label}.json").write_text(json.dumps(brief, indent=2))
        return report


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = os.environ.get("GPU_CHECK_FOLDER")
    made = Runs(Path(folder) if folder else tmp_path_factory.mktemp("engines"))
    for item in request.session.items:
        name = getattr(getattr(item, "callspec", None), "params", {}).get("name")
        if name in CASES:
            made.start(name)
    yield made
    made.close()


@pytest.mark.parametrize("name", CASES)
def test_tokens_stay_when_weights_went_and_came(runs: Runs, name: str) -> None:
    vanilla, ours = runs.reports(name)
    assert ours["tokens"] == vanilla["tokens"]
    assert ours["again"] == vanilla["again"]
    assert ours["after_all"] == ours["again"]
    assert ours["after_half"] == ours["again"]
    assert ours["asleep_pages"] == 0
    assert ours["after_sleep"] == ours["again"]
    assert ours["spoiled"] != ours["again"]
    assert ours["do_layers_wait"] == (name in LAYERS)
    assert sum(ours["static"].values()) <= 0.02 * ours["bound_bytes"]
    assert ours["bound_bytes"] <= PACKED_BYTES.get(name, ours["bound_bytes"])
