"""A tiny model, some of whose layers keep only the last tokens, with weights."""

import json
from pathlib import Path

from kvcached_demo.harness.model import CONFIG, make_model

WINDOW_TOKENS = 64
LAYERS = ["full_attention", "sliding_attention"] * 2


def make_window_model(folder: Path, *, seed: int) -> Path:
    """Write a Llama of which every other layer has a sliding window."""
    make_model(folder, seed=seed)
    config = CONFIG | {"layer_types": LAYERS, "sliding_window": WINDOW_TOKENS}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder
