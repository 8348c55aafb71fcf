"""Real vLLM engines on two GPUs: the same pages on both, one promise for both, vanilla's tokens."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.shapes import make_shape

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400)]

SCRIPT = Path(__file__).parents[1] / "helpers" / "two_ranks.py"
TENSOR = {"tensor_parallel_size": 2, "disable_custom_all_reduce": True}
PIPELINE = {"pipeline_parallel_size": 2}
EAGER = {"enforce_eager": True}
# Stages of different depth map pages of different size.
UNEVEN = {"VLLM_PP_LAYER_PARTITION": "5,3"}

CASES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "tensor parallel, graphs": (TENSOR, {}),
    "tensor parallel, eager": (TENSOR | EAGER, {}),
    "tensor parallel, weights yield": (TENSOR, {"KVCACHED_WEIGHTS": "yield"}),
    "pipeline parallel": (PIPELINE | EAGER, {}),
    "pipeline parallel, uneven": (PIPELINE | EAGER, UNEVEN),
}


def start(folder: Path, name: str, *, elastic: bool) -> subprocess.Popen[str]:
    options, variables = CASES[name]
    own = folder / ("elastic" if elastic else "vanilla")
    model = make_shape(own / "model", "llama-small")
    environ = os.environ | {
        "ENABLE_KVCACHED": str(int(elastic)),
        "KVCACHED_DIR": str(folder / "kv"),
        "KVCACHED_DEBUG": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": f"{SCRIPT.parents[1]}:{os.environ.get('PYTHONPATH', '')}",
        "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",  # multicast must stay off on shared hosts
        "VLLM_CACHE_ROOT": str(own / "cache"),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }
    with (own / "log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, str(SCRIPT), str(model), json.dumps({"gpu": True} | options)],
            env=environ | variables,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )


def finish(process: subprocess.Popen[str], log: Path) -> Any:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, log.read_text()[-6000:]
    (report,) = (line for line in output.splitlines() if line.startswith("{"))
    return json.loads(report)


@pytest.mark.parametrize("name", CASES)
def test_ranks_on_two_gpus_map_the_same_pages_and_answer_as_vanilla(
    tmp_path: Path, name: str
) -> None:
    import torch

    assert torch.cuda.device_count() >= 2, "these checks need two CUDA devices"
    started = [start(tmp_path, name, elastic=elastic) for elastic in (False, True)]
    vanilla, ours = (
        finish(process, tmp_path / kind / "log")
        for process, kind in zip(started, ("vanilla", "elastic"), strict=True)
    )
    assert ours["tokens"] == vanilla["tokens"]
    assert len({tuple(tokens) for tokens in ours["tokens"]}) > len(ours["tokens"]) // 4
    first, second = ours["pages"]
    assert first == second
    assert len(first) <= 2
    views = [view for view in ours["view"] if view["engine"].startswith("vllm")]
    assert len(views) == 2
    assert [view["promised_bytes"] for view in views] == [0, 0]
    assert all(view["resident_bytes"] > 0 for view in views)
    if "asleep_pages" in ours:
        assert ours["asleep_pages"] == [0, 0]
        assert ours["tokens_after_sleep"] == vanilla["tokens"]
        first, second = ours["awake_pages"]
        assert first == second > 0
    assert ("asleep_pages" in ours) == ("KVCACHED_WEIGHTS" in CASES[name][1])
