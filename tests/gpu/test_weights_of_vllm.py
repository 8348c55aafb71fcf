"""Real vLLM engines on the GPU whose weights are given and come back: the tokens stay."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.gpu_engine import run_engine
from helpers.gpu_runs import Runs, runs_of, write_brief

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


def run(folder: Path, name: str, *, elastic: bool) -> Any:
    shape, runner, options = CASES[name]
    label = f"{name} {'ours' if elastic else 'vanilla'}".replace(" ", "-")
    own = {"DUMMY_SEED": "1"} | ({"KVCACHED_WEIGHTS": "yield"} if elastic else {})
    if elastic and name in LAYERS:
        own["KVCACHED_WEIGHTS_WAIT"] = "layers"
    report = run_engine(SCRIPT, folder / label, shape, options, own, elastic=elastic, runner=runner)
    brief = {key: value for key, value in report.items() if not isinstance(value, list)}
    write_brief(folder, label, brief)
    return report


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Runs]:
    yield from runs_of(request, tmp_path_factory, run, NUM_AT_ONCE)


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
