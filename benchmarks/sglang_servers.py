"""What the benchmarks of SGLang's servers share: how one is started, and SGLang's own client.

On a GPU the model has the shape of Llama-3.1-8B and dummy weights, and attention is Triton's;
`SGLANG_PYTHON` names the interpreter of the environment that has SGLang. `--tiny` is a rehearsal on
a CPU.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_servers import FIGURES, instance_view, kv_bytes_per_token, make_shape

from kvcached_core.ledger.view import InstanceView
from kvcached_core.units import MIB
from kvcached_demo.harness.model import make_model
from kvcached_demo.harness.server import SGLANG_HOST_OPTIONS, SGLangServer

PYTHON = os.environ.get("SGLANG_PYTHON", sys.executable)
KV_BYTES_PER_TOKEN = kv_bytes_per_token("llama-8b")
GPU_OPTIONS = (
    *("--load-format", "dummy", "--dtype", "bfloat16", "--context-length", "8192"),
    *("--attention-backend", "triton", "--sampling-backend", "pytorch"),
    *("--grammar-backend", "none", "--log-level", "info", "--cuda-graph-max-bs-decode", "256"),
)


@dataclass
class SGLangSetting:
    """Where servers run and what they serve.

    Attributes:
        folder: For logs, models and the ledger.
        tiny: Whether it is a rehearsal on a CPU.
    """

    folder: Path
    tiny: bool

    def __post_init__(self) -> None:
        make = make_model if self.tiny else make_shape
        options: dict[str, Any] = {"seed": 1} if self.tiny else {"shape": "llama-8b"}
        self.model = make(self.folder / "model", **options)

    def start(
        self, name: str, *arguments: str, elastic: bool, kv_bytes: int | None = None
    ) -> SGLangServer:
        """Start a server with at most `kv_bytes` of KV cache; a vanilla one seizes them."""
        sizes: tuple[str, ...] = ()
        environ = {"KVCACHED_DIR": str(self.folder / "kv"), "ENABLE_KVCACHED": "0"}
        if not self.tiny:
            environ |= {"TMPDIR": "/tmp", "SGLANG_USE_CPU_ENGINE": "0"}  # noqa: S108  sockets
            environ["PYTHONPATH"] = ""
        if elastic:
            sizes = ("--enable-kvcached", "--kvcached-name", name)
            sizes += ("--kvcached-limit", str(kv_bytes)) if kv_bytes else ()
        elif kv_bytes:
            sizes = ("--max-total-tokens", str(kv_bytes // KV_BYTES_PER_TOKEN))
        if self.tiny:
            sizes += ("--max-total-tokens", "8192", "--mem-fraction-static", "0.3")
            environ["KVCACHED_HOST_POOL"] = str(512 * MIB)
        return SGLangServer(
            name,
            self.model,
            self.folder,
            environ=environ,
            arguments=(*arguments, *sizes),
            options=SGLANG_HOST_OPTIONS if self.tiny else GPU_OPTIONS,
            python=PYTHON,
        )

    def view(self, name: str) -> InstanceView:
        """Return what the ledger says of an instance."""
        return instance_view(self.folder, name)

    def bench(  # noqa: PLR0917  the workload is a tuple
        self, server: SGLangServer, num_in: int, num_out: int, rate: str, num: int, seed: int
    ) -> dict[str, Any]:
        """Run SGLang's `bench_serving` against a server and return its figures."""
        output = self.folder / f"{server.name}-bench.jsonl"
        output.unlink(missing_ok=True)
        words = [
            *("-m", "sglang.benchmark.serving", "--backend", "sglang"),
            *("--base-url", server.url, "--model", str(self.model), "--tokenizer"),
            *(str(self.model), "--dataset-name", "random-ids", "--tokenize-prompt"),
            *("--random-input-len", str(num_in), "--random-output-len", str(num_out)),
            *("--random-range-ratio", "1.0", "--num-prompts", str(num), "--request-rate", rate),
            *("--seed", str(seed), "--warmup-requests", "0", "--disable-tqdm"),
            *("--output-file", str(output)),
        ]
        environ = os.environ | {"HF_HUB_OFFLINE": "1", "ENABLE_KVCACHED": "0"}
        if not self.tiny:
            environ["PYTHONPATH"] = ""
        done = subprocess.run(
            [PYTHON, *words], env=environ, capture_output=True, text=True, check=False, timeout=500
        )
        if done.returncode:
            raise RuntimeError(f"the client failed: {done.stdout[-3000:]}{done.stderr[-3000:]}")
        result = json.loads(output.read_text().splitlines()[-1])
        figures = {key: result[key] for key in (*FIGURES, "completed", "duration")}
        return figures | {"failed": num - result["completed"]}
