"""Tiny models with drafts that they accept at 20 to 80 %, made without training.

The layers of the target add little to the embedding of the last token, so that the next token is
mostly a matter of that token. A draft that keeps the embedding, and has a layer of the target's,
then often says the same: how often, the noise on it decides.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from kvcached_demo.harness.model import CONFIG, make_model

Weights = Mapping[str, np.ndarray]

HIDDEN = 128
QUIET = 0.2  # of what a layer of our tiny models adds
NOISE = 0.25  # of the spread of each weight
DRAFT, EAGLE, EAGLE3, MTP = "draft_model", "eagle", "eagle3", "mtp"
TARGET = "target"
NUM_LAYERS = 4
NUM_HEADS, HEAD_DIM = 8, 128
MTP_HEADS, MTP_HEAD_DIM = 2, 64
WEIGHTS = "model.safetensors"
LOUD = ("o_proj.weight", "down_proj.weight")
INTO_HEADS = ("q_proj.weight", "k_proj.weight", "v_proj.weight")
# Qwen2's, with a layer for MTP behind.
MTP_CONFIG = {
    "architectures": ["MiMoForCausalLM"],
    "model_type": "qwen2",
    "num_attention_heads": MTP_HEADS,
    "num_key_value_heads": MTP_HEADS,
    "num_nextn_predict_layers": 1,
    "use_sliding_window": False,
}
EAGLE3_CONFIG = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "num_hidden_layers": 1,
    "draft_vocab_size": 512,
    "norm_before_residual": True,
    "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]},
}


def make_target(folder: Path, method: str, *, seed: int = 1) -> Path:
    """Write a target for drafts of `method`; one with a layer for MTP has that, too."""
    make_model(folder, seed=seed)
    weights = quiet(load_file(folder / WEIGHTS))
    if method == MTP:
        rewrite(folder, _with_mtp(weights), MTP_CONFIG)
    else:
        rewrite(folder, weights, {})
    return folder


def make_draft(folder: Path, target: Path, method: str, *, num_heads: int = NUM_HEADS) -> Path:
    """Write a draft of `method` for a target; `num_heads` are those of a draft of its own."""
    make_model(folder, seed=1)
    weights = load_file(target / WEIGHTS)
    changes: Mapping[str, Any]
    if method == DRAFT:
        changes = {"num_attention_heads": num_heads, "num_key_value_heads": num_heads}
        made = _with_heads(weights, num_heads * HEAD_DIM)
    elif method == EAGLE:
        made, changes = _eagle(weights), {"num_hidden_layers": 1}
    else:
        made, changes = eagle3(weights), EAGLE3_CONFIG
    rewrite(folder, noisy(made, NOISE), changes)
    return folder


def rewrite(folder: Path, weights: Weights, changes: Mapping[str, Any]) -> None:
    """Put weights, and what differs in the settings, in the place of a model's."""
    save_file(dict(weights), folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG | changes, indent=2))


def quiet(weights: Weights) -> dict[str, np.ndarray]:
    """Have the layers add little."""
    return {
        name: weight * np.float32(QUIET) if name.endswith(LOUD) else weight
        for name, weight in weights.items()
    }


def noisy(weights: Weights, noise: float) -> dict[str, np.ndarray]:
    """Add noise to weights, of this part of the spread of each."""
    random = np.random.default_rng(7)
    return {
        name: np.asarray(
            weight + random.standard_normal(weight.shape) * noise * weight.std(), np.float32
        )
        for name, weight in weights.items()
    }


def _with_heads(weights: Weights, num_rows: int) -> dict[str, np.ndarray]:
    """Leave so many rows of all heads together."""
    made = {}
    for name, weight in weights.items():
        if name.endswith(INTO_HEADS):
            made[name] = np.ascontiguousarray(weight[:num_rows])
        elif name.endswith("o_proj.weight"):
            made[name] = np.ascontiguousarray(weight[:, :num_rows])
        else:
            made[name] = weight
    return made


def layer_of(weights: Weights, layer: int, prefix: str) -> dict[str, np.ndarray]:
    """Return a layer, by other names."""
    old = f"model.layers.{layer}."
    return {
        prefix + name.removeprefix(old): weight
        for name, weight in weights.items()
        if name.startswith(old)
    }


def _eagle(weights: Weights) -> dict[str, np.ndarray]:
    """Keep the embedding of the last token, and forget the target's hidden state."""
    made = layer_of(weights, 0, "layers.0.")
    del made["layers.0.input_layernorm.weight"]
    identity, nothing = np.eye(HIDDEN, dtype=np.float32), np.zeros((HIDDEN, HIDDEN), np.float32)
    return made | {"fc.weight": np.hstack([identity, nothing])}


def eagle3(weights: Weights) -> dict[str, np.ndarray]:
    """Have attention carry the embedding of the last token over to what is nearly nothing."""
    made = layer_of(weights, 0, "midlayer.")
    both = {name: made[f"midlayer.self_attn.{name}_proj.weight"] for name in "qkv"}
    nothing = np.zeros((8 * HIDDEN, HIDDEN), np.float32)
    identity = np.tile(np.eye(HIDDEN, dtype=np.float32), (8, 1))
    both["q"] = both["k"] = identity * np.float32(1.5)
    both["v"] = identity
    for name, weight in both.items():
        made[f"midlayer.self_attn.{name}_proj.weight"] = np.hstack([weight, nothing])
    made["midlayer.self_attn.o_proj.weight"] = identity.T / np.float32(8)
    forget = np.zeros((HIDDEN, 3 * HIDDEN), np.float32)
    forget[:, -HIDDEN:] = np.eye(HIDDEN, dtype=np.float32)
    return made | {
        "midlayer.hidden_norm.weight": np.full(HIDDEN, 0.01, np.float32),
        "norm.weight": np.ones(HIDDEN, np.float32),
        "fc.weight": forget,
        "lm_head.weight": weights["lm_head.weight"],
    }


def _with_mtp(weights: Weights) -> dict[str, np.ndarray]:
    """Turn a target into one of Qwen2's shape, with a layer that predicts one more token."""
    rows = MTP_HEADS * MTP_HEAD_DIM
    made = _with_heads(weights, rows)
    for name in weights:
        if name.endswith(INTO_HEADS):
            made[name.replace(".weight", ".bias")] = np.zeros(rows, np.float32)
    prefix = "model.mtp_layers.0."
    layer = layer_of(made, 0, prefix)
    identity, nothing = np.eye(HIDDEN, dtype=np.float32), np.zeros((HIDDEN, HIDDEN), np.float32)
    layer |= {
        f"{prefix}token_layernorm.weight": np.ones(HIDDEN, np.float32),
        f"{prefix}hidden_layernorm.weight": np.ones(HIDDEN, np.float32),
        f"{prefix}final_layernorm.weight": np.ones(HIDDEN, np.float32),
        f"{prefix}input_proj.weight": np.hstack([nothing, identity]),
    }
    return made | noisy(layer, NOISE)
