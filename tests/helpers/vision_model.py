"""A tiny BLIP-2 with random weights, made on the spot: what it says depends on what it sees."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import load_file, save_file

from kvcached_demo.harness.model import CONFIG, _tokenizer, make_model, save_tokenizer

SIDE, PATCH_SIDE = 32, 8  # pixels
NUM_IMAGE_TOKENS = 64
IMAGE = "<image>"
WIDTH = 32  # numbers for each patch, and for each of the image's tokens before they are words
LAYERS = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
PIXELS = {
    "image_processor_type": "BlipImageProcessor",
    "processor_class": "Blip2Processor",
    "size": {"height": SIDE, "width": SIDE},
}


def make_vision_model(folder: Path) -> Path:
    """Write the model, a tokenizer, and how images become pixels, to `folder`."""
    make_model(folder, seed=5)
    tokenizer = _tokenizer()
    tokenizer.add_special_tokens([IMAGE])
    save_tokenizer(tokenizer, folder, model_max_length=CONFIG["max_position_embeddings"])
    config = {
        "architectures": ["Blip2ForConditionalGeneration"],
        "model_type": "blip-2",
        "num_query_tokens": NUM_IMAGE_TOKENS,
        "image_token_index": tokenizer.token_to_id(IMAGE),
        "text_config": CONFIG,
        "vision_config": LAYERS | {"image_size": SIDE, "patch_size": PATCH_SIDE},
        "qformer_config": LAYERS | {"encoder_hidden_size": WIDTH, "vocab_size": 8},
        "torch_dtype": "float32",
    }
    words = {"processor_class": "Blip2Processor", "num_query_tokens": NUM_IMAGE_TOKENS}
    for name, content in (
        ("config", config),
        ("preprocessor_config", PIXELS),
        ("processor_config", words),
    ):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2))
    text = load_file(folder / "model.safetensors")
    save_file(
        {f"language_model.{name}": weight for name, weight in text.items()} | _seeing(config),
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder


def picture(seed: int) -> Image.Image:
    """Return an image of colours that nobody chose."""
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 256, (SIDE, SIDE, 3), np.uint8))


def _seeing(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return weights of all but the words: large ones, so that images differ in their tokens."""
    import torch
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    with torch.device("meta"):
        empty = Blip2ForConditionalGeneration(Blip2Config(**config)).state_dict()
    random = np.random.default_rng(6)
    weights = {}
    for name, parameter in empty.items():
        if name.startswith("language_model."):
            continue
        shape = tuple(parameter.shape)
        if len(shape) > 1:
            values = random.standard_normal(shape) * 2 * float(np.prod(shape[1:])) ** -0.5
        else:
            values = np.full(shape, 1.0 if "norm" in name.lower() and "weight" in name else 0.0)
        weights[name] = np.asarray(values, np.float32)
    return weights
