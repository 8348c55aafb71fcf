"""Real vLLM engines with drafts on a GPU, in both runners: vanilla's tokens and acceptance.

Where vLLM alone ends, or answers otherwise when it is asked again, there is nothing to compare.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.draft_models import (
    DRAFT,
    EAGLE,
    EAGLE3,
    MTP,
    NUM_LAYERS,
    TARGET,
    make_draft,
    make_target,
)

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

SCRIPT = Path(__file__).parents[1] / "helpers" / "speculating.py"

CASES = [(method, runner) for method in (EAGLE, EAGLE3, DRAFT, MTP) for runner in (1, 2)]


def report_of(folder: Path, method: str, runner: int, *, elastic: bool) -> Any:
    target = folder / TARGET
    speculative = {"method": method, "num_speculative_tokens": 1 if method == MTP else 3}
    if method != MTP:
        speculative["model"] = str(folder / "draft")
    options: dict[str, Any] = {"dtype": "bfloat16", "enforce_eager": False, "block_size": 16}
    if not elastic:
        options |= {"kv_cache_memory_bytes": 2 << 30, "gpu_memory_utilization": 0.05}
    asked = {
        "speculative": speculative,
        "options": options,
        "acts": ["give_weights"] if elastic else [],
    }
    environ = os.environ | {
        "ENABLE_KVCACHED": str(int(elastic)),
        "KVCACHED_DIR": str(folder / "kv"),
        "KVCACHED_DEBUG": "1",
        "KVCACHED_WEIGHTS": "yield",
        "KVCACHED_WEIGHTS_KEPT_SECONDS": "0",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": f"{SCRIPT.parents[1]}:{os.environ.get('PYTHONPATH', '')}",
        "VLLM_CACHE_ROOT": str(folder / "cache"),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_V2_MODEL_RUNNER": str(runner - 1),
    }
    log = folder / f"log-{elastic}"
    with log.open("w") as errors:
        done = subprocess.run(
            [sys.executable, str(SCRIPT), str(target), json.dumps(asked)],
            env=environ,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            check=False,
            timeout=400,
        )
    said = log.read_text()
    if done.returncode and not elastic:
        pytest.skip(f"vLLM alone ends: {said.strip().splitlines()[-1]}")
    assert done.returncode == 0, said[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("method", "runner"), CASES)
def test_tokens_and_acceptance_are_vanillas(tmp_path: Path, method: str, runner: int) -> None:
    target = make_target(tmp_path / TARGET, method)
    if method != MTP:
        make_draft(tmp_path / "draft", target, method)
    vanilla, again, ours = (
        report_of(tmp_path, method, runner, elastic=elastic) for elastic in (False, False, True)
    )
    if again["tokens"] != vanilla["tokens"]:
        pytest.skip("vLLM alone answers otherwise the second time")
    assert ours["tokens"] == vanilla["tokens"]
    assert len({tuple(tokens) for tokens in ours["tokens"]}) > 15
    assert ours["counts"] == vanilla["counts"]
    assert ours["counts"]["accepted"] > 0
    assert ours["draft_planes"] == ours["planes"][NUM_LAYERS:]
    assert ours["after_last"] <= 2 * ours["page_bytes"]
    assert all(ours["draft_weights"])
    assert ours["asleep_weight_pages"] == 0
    assert ours["tokens_after_sleep"] == vanilla["tokens"]
