"""What the benchmarks of SGLang's servers share: how one is started, and SGLang's own client.

On a GPU the model has the shape of Llama-3.1-8B and dummy weights, and attention is Triton's;
`SGLANG_PYTHON` names the interpreter of the environment that has SGLang. `--tiny` is a rehearsal on
a CPU.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from parts.vllm_servers import FIGURES, kv_bytes_per_token, make_shape

from kvcached_core.units import MIB
from kvcached_demo.harness.engines import SGLANG
from kvcached_demo.harness.model import KV_BYTES_PER_TOKEN, make_model
from kvcached_demo.harness.server import ENGINE_ENVIRON, EngineServer
from kvcached_demo.harness.servers import Servers

TINY_POOL_BYTES = 512 * MIB
TINY_KV_BYTES = 256 * MIB
GPU_OPTIONS = (
    *("--load-format", "dummy", *SGLANG.gpu_options(8192)),
    *("--cuda-graph-max-bs-decode", "256"),
)


class SGLangSetting:
    """What is served, and where.

    Args:
        folder: For logs, models and the ledger.
        tiny: Whether it is a rehearsal on a CPU.
        servers: Where the servers run; by themselves where it is left out.
    """

    def __init__(self, folder: Path, *, tiny: bool, servers: Servers | None = None) -> None:
        self.tiny = tiny
        self.servers = servers or Servers(folder, TINY_POOL_BYTES if tiny else None)
        place = folder / "sglang-model"
        self.model = make_model(place, seed=1) if tiny else make_shape(place, "llama-8b")

    def start(
        self, name: str, *arguments: str, elastic: bool, kv_bytes: int | None = None
    ) -> EngineServer:
        """Start a server with at most `kv_bytes` of KV cache; a vanilla one seizes them."""
        per_token = KV_BYTES_PER_TOKEN if self.tiny else kv_bytes_per_token("llama-8b")
        size: tuple[str, ...] = ()
        if self.tiny or kv_bytes:
            size = SGLANG.size(
                kv_bytes or TINY_KV_BYTES, per_token, is_elastic=elastic, is_host=self.tiny
            )
        return self.servers.start(
            SGLANG,
            name,
            self.model,
            *arguments,
            *size,
            is_elastic=elastic,
            limit_bytes=kv_bytes,
            options=SGLANG.host_options if self.tiny else GPU_OPTIONS,
            environ={} if self.tiny else {"PYTHONPATH": ""},
        )

    def bench(  # noqa: PLR0917  the workload is a tuple
        self, server: EngineServer, num_in: int, num_out: int, rate: str, num: int, seed: int
    ) -> dict[str, Any]:
        """Run SGLang's `bench_serving` against a server and return its figures."""
        output = self.servers.workspace / f"{server.name}-bench.jsonl"
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
        environ = {**os.environ, **ENGINE_ENVIRON, "ENABLE_KVCACHED": "0"}
        if not self.tiny:
            environ["PYTHONPATH"] = ""
        done = subprocess.run(
            [SGLANG.python, *words],
            env=environ,
            capture_output=True,
            text=True,
            check=False,
            timeout=500,
        )
        if done.returncode:
            raise RuntimeError(f"the client failed: {done.stdout[-3000:]}{done.stderr[-3000:]}")
        result = json.loads(output.read_text().splitlines()[-1])
        figures = {key: result[key] for key in (*FIGURES, "completed", "duration")}
        return figures | {"failed": num - result["completed"]}
