"""Tiny targets and drafts for SGLang, of which a target accepts a part, made without training.

The layers of the target add little to the embedding of the last token, so the next token is mostly
a matter of that one. A draft that keeps the embedding then often says the same.
"""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from helpers.draft_models import (
    EAGLE3_CONFIG,
    HIDDEN,
    WEIGHTS,
    eagle3,
    layer_of,
    noisy,
    quiet,
    rewrite,
)
from kvcached_demo.harness.model import make_model

NOISE = 0.15  # of the spread of each weight
EMBEDDING_NOISE = 0.02
# What is left of what the layers of a model of any kind add. Attention and states have to be heard.
ADDED = {
    "o_proj.weight": 0.1,
    "out_proj.weight": 0.1,
    "down_proj.weight": 0.02,
    "w2.weight": 0.02,
}
HEADS = ("num_attention_heads", "num_key_value_heads")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def quiet_target(folder: Path) -> Path:
    """Write a target to `folder`."""
    make_model(folder, seed=1)
    rewrite(folder, quiet(load_file(folder / WEIGHTS)), {})
    return folder


def noised_copy(folder: Path, target: Path) -> Path:
    """Write a draft that is a target with noise: a standalone model."""
    make_model(folder, seed=1)
    rewrite(folder, noisy(load_file(target / WEIGHTS), NOISE), {})
    return folder


def eagle_head(folder: Path, target: Path) -> Path:
    """Write a draft of one layer, which forgets the target's hidden state."""
    make_model(folder, seed=1)
    layer = layer_of(load_file(target / WEIGHTS), 0, "layers.0.")
    del layer["layers.0.input_layernorm.weight"]
    keep = np.eye(HIDDEN, 2 * HIDDEN, dtype=np.float32)
    fusing = {"fc.weight": keep, "fc.bias": np.zeros(HIDDEN, np.float32)}
    config = {"architectures": ["LlamaForCausalLMEagle"], "num_hidden_layers": 1}
    rewrite(folder, noisy(layer, NOISE) | fusing, config)
    return folder


def quiet_copy(folder: Path, model: Path) -> Path:
    """Write a target that is a model whose layers add little, so that a draft often is right."""
    shutil.copytree(model, folder, dirs_exist_ok=True)
    weights = load_file(model / WEIGHTS)
    for name, weight in weights.items():
        for end, part in ADDED.items():
            if name.endswith(end):
                weights[name] = weight * np.float32(part)
    _write(folder, weights)
    return folder


def embedding_draft(folder: Path, target: Path) -> Path:
    """Write a standalone draft for a target of any kind: a Qwen3 with its embedding, and noise.

    Its keys have the size of the target's.
    """
    from helpers.sglang_models import qwen3, save

    config = json.loads((target / "config.json").read_text())
    sizes = {name: config[name] for name in ("hidden_size", *HEADS)}
    save(partial(qwen3, num_hidden_layers=2, **sizes), folder)
    kept = load_file(target / WEIGHTS)
    same = noisy({EMBEDDING: kept[EMBEDDING], HEAD: kept[HEAD]}, EMBEDDING_NOISE)
    _write(folder, quiet(quiet(load_file(folder / WEIGHTS))) | same)
    return folder


def eagle3_head(folder: Path, target: Path) -> Path:
    """Write a head for a Qwen3: SGLang adds the target's states as they are, so they are small."""
    make_model(folder, seed=1)
    made = eagle3(load_file(target / WEIGHTS))
    made["fc.weight"] *= np.float32(0.01)
    kept = {
        name: made[name] for name in made if not name.endswith(("q_norm.weight", "k_norm.weight"))
    }
    layers = {"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}
    rewrite(folder, noisy(kept, NOISE), EAGLE3_CONFIG | {"eagle_config": layers})
    return folder


def _write(folder: Path, weights: dict[str, np.ndarray]) -> None:
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
