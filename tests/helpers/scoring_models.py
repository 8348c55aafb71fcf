"""A tiny model that judges texts instead of going on with them, made on the spot."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from kvcached_demo.harness.model import CONFIG, make_model

WEIGHTS = "model.safetensors"
HIDDEN = 128


def make_classifier(folder: Path, *, num_labels: int) -> Path:
    """Write a Llama whose last hidden state is judged."""
    make_model(folder, seed=1)
    weights = load_file(folder / WEIGHTS)
    del weights["lm_head.weight"]
    weights["score.weight"] = _matrix(num_labels, HIDDEN)
    names = {"architectures": ["LlamaForSequenceClassification"], "pad_token_id": 0}
    _rewrite(folder, weights, CONFIG | names | _labels(num_labels))
    return folder


def _labels(number: int) -> dict[str, object]:
    return {"id2label": {str(label): f"LABEL_{label}" for label in range(number)}}


def _matrix(rows: int, columns: int) -> np.ndarray:
    random = np.random.default_rng(2)
    return np.asarray(random.standard_normal((rows, columns)) * columns**-0.5, np.float32)


def _rewrite(folder: Path, weights: dict[str, np.ndarray], config: dict[str, object]) -> None:
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))
