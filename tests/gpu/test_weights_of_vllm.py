"""Real vLLM engines on the GPU whose weights are given and come back: the tokens stay."""

import json
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from helpers.shapes import make_lora, make_shape

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
}


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
        folder = self.folder / label
        model = make_shape(folder / "model", shape)
        if "lora" in options:
            options = options | {"lora": str(make_lora(folder / "lora", shape))}
        environ = os.environ | {
            "ENABLE_KVCACHED": str(int(elastic)),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": f"{SCRIPT.parents[1]}:{os.environ.get('PYTHONPATH', '')}",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CACHE_ROOT": str(folder / "cache"),
            "DUMMY_SEED": "1",
        }
        if elastic:
            environ |= {"KVCACHED_NAME": label, "KVCACHED_WEIGHTS": "yield"}
        if runner is not None:
            environ["VLLM_USE_V2_MODEL_RUNNER"] = str(runner - 1)
        with (folder / "log").open("w") as log:
            done = subprocess.run(
                [sys.executable, str(SCRIPT), str(model), json.dumps(options)],
                env=environ,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                check=False,
                timeout=400,
            )
        text = (folder / "log").read_text()
        assert done.returncode == 0, f"{label} ended with {done.returncode}:\n{text[-6000:]}"
        report = json.loads(done.stdout.splitlines()[-1])
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
    assert sum(ours["static"].values()) <= 0.02 * ours["bound_bytes"]
