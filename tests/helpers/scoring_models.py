"""Tiny models that judge texts instead of going on with them, made on the spot."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from helpers.encoder_models import HIDDEN, make_encoder
from kvcached_demo.harness.model import CONFIG, make_model

WEIGHTS = "model.safetensors"
DECODER_HIDDEN = 128


def make_classifier(folder: Path, *, num_labels: int) -> Path:
    """Write a Llama whose last hidden state is judged; with one label it is a reranker."""
    make_model(folder, seed=1)
    weights = load_file(folder / WEIGHTS)
    del weights["lm_head.weight"]
    weights["score.weight"] = _matrix(num_labels, DECODER_HIDDEN)
    names = {"architectures": ["LlamaForSequenceClassification"], "pad_token_id": 0}
    _rewrite(folder, weights, CONFIG | names | _labels(num_labels))
    return folder


def make_cross_encoder(folder: Path) -> Path:
    """Write a BERT that reads two texts at once and gives a score: it has no KV cache."""
    make_encoder(folder)
    weights = {f"bert.{name}": one for name, one in load_file(folder / WEIGHTS).items()}
    for name, rows in (("bert.pooler.dense", HIDDEN), ("classifier", 1)):
        weights[f"{name}.weight"] = _matrix(rows, HIDDEN)
        weights[f"{name}.bias"] = np.zeros(rows, np.float32)
    config = json.loads((folder / "config.json").read_text())
    names = {"architectures": ["BertForSequenceClassification"]}
    _rewrite(folder, weights, config | names | _labels(1))
    return folder


def _labels(number: int) -> dict[str, object]:
    return {"id2label": {str(label): f"LABEL_{label}" for label in range(number)}}


def _matrix(rows: int, columns: int) -> np.ndarray:
    random = np.random.default_rng(2)
    return np.asarray(random.standard_normal((rows, columns)) * columns**-0.5, np.float32)


def _rewrite(folder: Path, weights: dict[str, np.ndarray], config: dict[str, object]) -> None:
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))
