"""Two sizes of the same run: tiny models on vLLM's CPU engine, or 8B shapes on a GPU."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from machine import describe_gpu, describe_machine

from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.nvml import GPU_PREFIXES, free_memory_reader
from kvcached_demo.harness.model import KV_BYTES_PER_TOKEN, make_model
from kvcached_demo.harness.server import HOST_OPTIONS, EngineServer

# The default of KVCACHED_HEADROOM, as a part of what is left without it.
HEADROOM = 0.02 / 0.98


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
    """

    make: Callable[[Path], Path]
    describe: Callable[[], dict[str, Any]]
    pool_bytes: int
    kv_bytes_per_token: int
    num_prompt_tokens: int
    options: tuple[str, ...]
    environ: dict[str, str] = field(default_factory=dict)

    def start(
        self, name: str, workspace: Path, *arguments: str, core: int = 0, **environ: str
    ) -> EngineServer:
        """Start an elastic server of the model in `workspace`, which was made there."""
        settings = {
            "ENABLE_KVCACHED": "1",
            "KVCACHED_DIR": str(workspace / "kv"),
            "KVCACHED_NAME": name,
            "VLLM_LOGGING_LEVEL": "WARNING",
        }
        return EngineServer(
            name,
            workspace / "model",
            workspace,
            environ=settings | self.environ | environ,
            arguments=arguments,
            core=core,
            options=self.options,
        )


def _make_tiny(folder: Path) -> Path:
    return make_model(folder, seed=1)


def _make_8b(folder: Path) -> Path:
    import sys

    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
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
        options=(*HOST_OPTIONS, "--max-num-seqs", "16"),
        environ={"KVCACHED_HOST_POOL": str(pool_bytes), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
    )


def gpu(pool_bytes: int) -> Profile:
    """Return the profile of a GPU, where servers of 8B shapes with dummy weights share it."""
    return Profile(
        make=_make_8b,
        describe=describe_gpu,
        pool_bytes=pool_bytes,
        kv_bytes_per_token=128 * 1024,
        num_prompt_tokens=7600,
        options=("--load-format", "dummy", "--max-model-len", "8192", "--enforce-eager"),
        environ={"TMPDIR": "/tmp"},  # noqa: S108  vLLM's sockets need a short path
    )


def open_ledger(workspace: Path) -> Ledger:
    """Open the ledger that the servers in `workspace` made."""
    (path,) = (workspace / "kv").glob("*.ledger")
    if not path.stem.startswith(GPU_PREFIXES):
        return Ledger(path)
    with Ledger(path) as ledger:
        headroom_bytes = int(ledger.capacity_bytes * HEADROOM)
    read = free_memory_reader(path.stem)
    return Ledger(path, free_bytes=lambda: read() - headroom_bytes)


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the arguments that both runs have."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--json", type=Path, required=True)
    made.add_argument("--gpu", action="store_true", help="8B shapes on a GPU")
    return made
