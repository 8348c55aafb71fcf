"""The kinds of engines that the demo can run, and what each is started with."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from kvcached_demo.harness.model import KV_BYTES_PER_TOKEN
from kvcached_demo.harness.server import EngineServer, SGLangServer


def _vllm_vanilla(pool_bytes: int) -> tuple[str, ...]:
    return ("--kv-cache-memory-bytes", str(pool_bytes))


def _sglang_size(pool_bytes: int) -> tuple[str, ...]:
    return ("--max-total-tokens", str(pool_bytes // KV_BYTES_PER_TOKEN))


def _nothing(_pool_bytes: int) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True)
class Kind:
    """One kind of engine.

    Attributes:
        title: What it is called.
        server: Starts one.
        arguments: What every one is started with, without a prefix cache.
        sizes: What each is told of the pool, in both runs.
        vanilla_sizes: What one without kvcached is told beside that.
        environ: Its settings.
        python: The interpreter of its environment.
    """

    title: str
    server: type[EngineServer]
    arguments: tuple[str, ...]
    sizes: Callable[[int], tuple[str, ...]] = _nothing
    vanilla_sizes: Callable[[int], tuple[str, ...]] = _nothing
    environ: dict[str, str] = field(default_factory=dict)
    python: str = sys.executable

    def start(
        self,
        name: str,
        model: Path,
        workspace: Path,
        *,
        environ: dict[str, str],
        pool_bytes: int,
        is_vanilla: bool,
        core: int,
    ) -> EngineServer:
        """Start a server of this kind."""
        sizes = self.sizes(pool_bytes)
        if is_vanilla:
            sizes += self.vanilla_sizes(pool_bytes)
        return self.server(
            name,
            model,
            workspace,
            environ={**self.environ, **environ},
            arguments=self.arguments + sizes,
            core=core,
            python=self.python,
        )


KINDS = {
    "vllm": Kind(
        "vLLM",
        EngineServer,
        ("--no-enable-prefix-caching", "--max-num-seqs", "32"),
        vanilla_sizes=_vllm_vanilla,
        environ={"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"},
    ),
    "sglang": Kind(
        "SGLang",
        SGLangServer,
        (
            *("--disable-radix-cache", "--max-running-requests", "32"),
            *("--mem-fraction-static", "0.3"),
        ),
        sizes=_sglang_size,
        python=os.environ.get("SGLANG_PYTHON", sys.executable),
    ),
}
