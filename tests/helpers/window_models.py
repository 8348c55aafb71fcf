"""Tiny models, some of whose layers keep only the last tokens, or a state, with weights."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from helpers.mixed_models import make_mixed_model
from kvcached_demo.harness.model import CONFIG, make_model

# What vLLM reads of an LFM2's settings beside what Transformers writes.
WIDTHS = ("conv_dim", "conv_dim_out", "block_dim")
WEIGHTS = "model.safetensors"
# Attention that looks at few tokens, and words that count less than what layers make of them.
SCALES = {"embed_tokens": 0.02, "q_layernorm": 4.0}
WINDOW_TOKENS = 64
LAYERS = ["full_attention", "sliding_attention"] * 2


def make_window_model(folder: Path, *, seed: int) -> Path:
    """Write a Llama of which every other layer has a sliding window."""
    make_model(folder, seed=seed)
    config = CONFIG | {"layer_types": LAYERS, "sliding_window": WINDOW_TOKENS}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def make_small_window_model(folder: Path, *, seed: int) -> Path:
    """Write one whose other layers have a quarter of its heads: vLLM gives these larger blocks."""
    settings = {"layer_types": LAYERS, "sliding_window": WINDOW_TOKENS}
    return make_mixed_model(folder, seed=seed, kv_heads=(2, 8, 2, 8), **settings)


def make_state_model(folder: Path) -> Path:
    """Write an LFM2: attention and short convolutions, of which each request has a state.

    vLLM reads words as it writes them: were they large, each answer would be the last word again.
    """
    from helpers.sglang_models import lfm2, save

    file = save(lfm2, folder) / "config.json"
    config = json.loads(file.read_text())
    widths = dict.fromkeys(WIDTHS, config["hidden_size"])
    file.write_text(json.dumps(config | widths | {"block_ff_dim": config["intermediate_size"]}))
    scaled = {
        name: weight * np.float32(SCALES.get(name.split(".")[-2], 1.0))
        for name, weight in load_file(folder / WEIGHTS).items()
    }
    save_file(scaled, folder / WEIGHTS, metadata={"format": "pt"})
    return folder
