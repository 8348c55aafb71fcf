"""Two sizes of the same run: tiny models on vLLM's CPU engine, or 8B shapes on a GPU."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parts.machine import describe_gpu, describe_machine
from parts.record import command_line

from kvcached_demo.harness.engines import VLLM
from kvcached_demo.harness.model import KV_BYTES_PER_TOKEN, make_model
from kvcached_demo.harness.server import EngineServer
from kvcached_demo.harness.servers import Servers

MODEL = "model"  # its folder below the workspace


@dataclass(frozen=True)
class Profile:
    """What differs between the host and a GPU.

    Attributes:
        make: Writes the model to a folder.
        describe: Says what machine it is.
        pool_bytes: What is there for KV caches, about.
        kv_bytes_per_token: Bytes of a token in all layers.
        num_prompt_tokens: Length of a prompt that fits the model.
        options: What every server is started with.
        environ: Its settings.
        is_host: Whether it is the host.
    """

    make: Callable[[Path], Path]
    describe: Callable[[], dict[str, Any]]
    pool_bytes: int
    kv_bytes_per_token: int
    num_prompt_tokens: int
    options: tuple[str, ...]
    environ: dict[str, str] = field(default_factory=dict)
    is_host: bool = False

    def servers(self, workspace: Path) -> Servers:
        """Return what starts servers that share the pool, once the model is made there."""
        self.make(workspace / MODEL)
        return Servers(workspace, self.pool_bytes if self.is_host else None)

    def start(self, servers: Servers, name: str, *arguments: str, **environ: str) -> EngineServer:
        """Start an elastic server of the model."""
        return servers.start(
            VLLM,
            name,
            servers.workspace / MODEL,
            *arguments,
            options=self.options,
            environ={"VLLM_LOGGING_LEVEL": "WARNING", **self.environ, **environ},
        )


def _make_tiny(folder: Path) -> Path:
    return make_model(folder, seed=1)


def _make_8b(folder: Path) -> Path:
    import sys

    sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
    from helpers.shapes import make_shape

    made: Path = make_shape(folder, "llama-8b")
    return made


def host(pool_bytes: int) -> Profile:
    """Return the profile of vLLM's CPU engine on a pool of this size."""
    return Profile(
        make=_make_tiny,
        describe=describe_machine,
        pool_bytes=pool_bytes,
        kv_bytes_per_token=KV_BYTES_PER_TOKEN,
        num_prompt_tokens=1900,
        options=(*VLLM.host_options, *VLLM.running(16)),
        environ=VLLM.host_environ,
        is_host=True,
    )


def gpu(pool_bytes: int) -> Profile:
    """Return the profile of a GPU, where servers of 8B shapes with dummy weights share it."""
    return Profile(
        make=_make_8b,
        describe=describe_gpu,
        pool_bytes=pool_bytes,
        kv_bytes_per_token=128 * 1024,
        num_prompt_tokens=7600,
        options=("--load-format", "dummy", *VLLM.gpu_options(8192), "--enforce-eager"),
    )


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the arguments that both runs have."""
    made = command_line(description)
    made.add_argument("--gpu", action="store_true", help="8B shapes on a GPU")
    return made
