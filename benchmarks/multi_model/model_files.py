"""Model folders of a GPU's run: one for each model, with files of the size that a real one has."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from helpers.shapes import SHAPES, make_files, make_shape

BYTES_PER_WEIGHT = 2  # bfloat16


def make_folder(folder: Path, shape: str) -> Path:
    """Make a model's folder; its files say their size, and nobody reads them."""
    return make_files(make_shape(folder, shape), shape_bytes(shape))


def shape_bytes(shape: str) -> int:
    """Return the bytes of the weights of a model with the shape of a Llama."""
    config = SHAPES[shape]
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"] * config["head_dim"]
    shared_heads = config["num_key_value_heads"] * config["head_dim"]
    attention = 2 * hidden * heads + 2 * hidden * shared_heads
    layer = attention + 3 * hidden * inner + 2 * hidden
    words = config["vocab_size"] * hidden
    tables = words if config["tie_word_embeddings"] else 2 * words
    return BYTES_PER_WEIGHT * (config["num_hidden_layers"] * layer + tables + hidden)
