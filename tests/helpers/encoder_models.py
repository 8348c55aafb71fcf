"""A tiny encoder without a KV cache, made on the spot."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from kvcached_demo.harness.model import save_tokenizer

HIDDEN, INNER, VOCABULARY, POSITIONS, NUM_LAYERS = 64, 128, 128, 256, 2
CONFIG = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "hidden_act": "gelu",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_attention_heads": 2,
    "num_hidden_layers": NUM_LAYERS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": POSITIONS,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "torch_dtype": "float32",
}


def make_encoder(folder: Path) -> Path:
    """Write a BERT with random weights, and a tokenizer that nobody asks, to `folder`."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
    random = np.random.default_rng(1)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return np.asarray(random.standard_normal((rows, columns)) * columns**-0.5, np.float32)

    weights = {
        "embeddings.word_embeddings.weight": matrix(VOCABULARY, HIDDEN),
        "embeddings.position_embeddings.weight": matrix(POSITIONS, HIDDEN),
        "embeddings.token_type_embeddings.weight": matrix(2, HIDDEN),
    }
    norms = ["embeddings.LayerNorm"]
    for layer in range(NUM_LAYERS):
        prefix = f"encoder.layer.{layer}."
        norms += [f"{prefix}attention.output.LayerNorm", f"{prefix}output.LayerNorm"]
        for name, rows, columns in (
            ("attention.self.query", HIDDEN, HIDDEN),
            ("attention.self.key", HIDDEN, HIDDEN),
            ("attention.self.value", HIDDEN, HIDDEN),
            ("attention.output.dense", HIDDEN, HIDDEN),
            ("intermediate.dense", INNER, HIDDEN),
            ("output.dense", HIDDEN, INNER),
        ):
            weights[f"{prefix}{name}.weight"] = matrix(rows, columns)
            weights[f"{prefix}{name}.bias"] = np.zeros(rows, np.float32)
    for name in norms:
        weights[f"{name}.weight"] = np.ones(HIDDEN, np.float32)
        weights[f"{name}.bias"] = np.zeros(HIDDEN, np.float32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    words = {f"w{index}": index for index in range(3, VOCABULARY)}
    tokenizer = Tokenizer(WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2} | words, unk_token="<unk>"))  # noqa: S106  a token
    tokenizer.pre_tokenizer = WhitespaceSplit()
    save_tokenizer(tokenizer, folder, model_max_length=POSITIONS)
    return folder
