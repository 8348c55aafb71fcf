"""The models that nodes of Ray serve in tests: tiny ones, each with an engine on the CPU."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.adapter import RANK, make_adapter
from helpers.gateway_engines import CHAT_TEMPLATE
from helpers.gateway_life import ENVIRON
from helpers.gateway_real import write_file
from kvcached_demo.harness.model import make_model

# An answer of so many tokens takes long enough to kill a node within it, however late its first
# event comes. Four engines on a node have room for one each.
NUM_TOKENS = 8192
POOL_BYTES = 2 << 30


@dataclass(frozen=True)
class Extent:
    """How much a cluster serves.

    Attributes:
        bases: Its models that have engines.
        adapters: The others, each with its base.
        num_requests: How many requests it is asked to lose none of.
    """

    bases: tuple[str, ...]
    adapters: Mapping[str, str]
    num_requests: int

    @property
    def models(self) -> tuple[str, ...]:
        return (*self.bases, *self.adapters)


COLD = "b"  # its engine is started as users start it, and outlives the gateway that did
FEW = Extent(("a", "b"), {"of-a": "a"}, 40)
MANY = Extent(("a", "b", "c", "d"), {"of-a": "a", "of-b": "b"}, 500)


def make_long_model(folder: Path, *, seed: int) -> Path:
    """Make a model whose answers may have `NUM_TOKENS`."""
    file = make_model(folder, seed=seed) / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"max_position_embeddings": NUM_TOKENS}))
    return folder


def models_in(folder: Path, extent: Extent) -> dict[str, dict[str, Any]]:
    """Make models in a folder; return their settings."""
    words = ["--chat-template", CHAT_TEMPLATE, "--max-model-len", str(NUM_TOKENS)]
    lora = ["--enable-lora", "--max-loras", "1", "--max-lora-rank", str(RANK)]
    folders = {name: make_long_model(folder / name, seed=ord(name)) for name in extent.bases}
    bases = {
        name: {
            "environment": "vllm",
            "model": str(path),
            "args": words + lora if name in extent.adapters.values() else words,
        }
        for name, path in folders.items()
    }
    adapters = {
        name: {"adapter_of": base, "path": str(make_adapter(folder / name, folders[base]))}
        for name, base in extent.adapters.items()
    }
    return {**bases, **adapters}


def write_models(folder: Path, extent: Extent) -> Path:
    """Write a file of these models."""
    file = folder / "models.yaml"
    write_file(file, models_in(folder, extent))
    values = json.loads(file.read_text())
    # Ray sets this for its workers, so gateways keep it from engines.
    values["environments"]["vllm"]["env"]["OMP_NUM_THREADS"] = ENVIRON["OMP_NUM_THREADS"]
    file.write_text(json.dumps(values))
    return file
