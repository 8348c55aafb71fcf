"""Tiny targets and drafts for SGLang, of which a target accepts a part, made without training.

The layers of the target add little to the embedding of the last token, so the next token is mostly
a matter of that one. A draft that keeps the embedding then often says the same.
"""

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from helpers.draft_models import HIDDEN, WEIGHTS, layer_of, noisy, quiet, rewrite
from kvcached_demo.harness.model import make_model

NOISE = 0.15  # of the spread of each weight


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
