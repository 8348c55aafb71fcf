"""The tiny models of the examples: `python -m kvcached_demo.harness.tiny FOLDER` makes them."""

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from kvcached_demo.harness.model import CONFIG, make_model

NAMES = ("one", "two", "three", "embedder", "reranker")
RERANKER = "reranker"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "assistant:"
)
MADE = ".made"


def make_tiny_models(folder: Path) -> None:
    """Write the models to folders of their names in `folder`, unless they are there.

    Three of them generate, one embeds, and one scores. All have random weights: they are quick, and
    what they say means nothing.
    """
    if (folder / MADE).exists():
        return
    for seed, name in enumerate(NAMES, 1):
        model = make_model(folder / name, seed=seed)
        (model / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    _score(folder / RERANKER)
    (folder / MADE).touch()


def _score(folder: Path) -> None:
    """Make a model score a pair of texts with one number instead of generating."""
    config = CONFIG | {
        "architectures": ["LlamaForSequenceClassification"],
        "num_labels": 1,
        "id2label": {"0": "relevance"},
        "label2id": {"relevance": 0},
        "pad_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    weights = load_file(folder / "model.safetensors")
    head = weights.pop("lm_head.weight")
    # Small, so that its scores are not all 0 or 1.
    weights["score.weight"] = np.asarray(0.1 * head[:1], np.float32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    make_tiny_models(Path(sys.argv[1]))
