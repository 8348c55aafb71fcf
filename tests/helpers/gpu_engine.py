"""One vLLM engine on a GPU, in a process of its own that runs a script of the helpers."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from helpers.shapes import make_lora, make_shape


def run_engine(
    script: Path,
    folder: Path,
    shape: str,
    options: dict[str, Any],
    environ: dict[str, str],
    *,
    elastic: bool,
    runner: int | None,
) -> Any:
    """Return what the script reports of an engine; raise with the end of its log if it failed.

    Args:
        script: What runs the engine, and prints a JSON object last.
        folder: For the model, its adapter, vLLM's cache and the log; its name is the instance's.
        shape: A name of `helpers.shapes`.
        options: What the script gets; for `lora` the adapter's folder takes the value's place.
        environ: More settings.
        elastic: Whether it is ours.
        runner: vLLM's model runner, 1 or 2; None leaves it to vLLM.
    """
    model = make_shape(folder / "model", shape)
    if "lora" in options:
        options = options | {"lora": str(make_lora(folder / "lora", shape))}
    variables = os.environ | {
        "ENABLE_KVCACHED": str(int(elastic)),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": f"{script.parents[1]}:{os.environ.get('PYTHONPATH', '')}",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(folder / "cache"),
        **environ,
    }
    if elastic:
        variables["KVCACHED_NAME"] = folder.name
    if runner is not None:
        variables["VLLM_USE_V2_MODEL_RUNNER"] = str(runner - 1)
    with (folder / "log").open("w") as log:
        done = subprocess.run(
            [sys.executable, str(script), str(model), json.dumps(options)],
            env=variables,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            check=False,
            timeout=400,
        )
    text = (folder / "log").read_text()
    assert done.returncode == 0, f"{folder.name} ended with {done.returncode}:\n{text[-6000:]}"
    return json.loads(done.stdout.splitlines()[-1])
