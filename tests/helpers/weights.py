"""Random weights of a Llama-like shape as a file, so that answers depend on the prompt.

    python tests/helpers/weights.py FOLDER llama-8b

The dummy weights that engines make are nearly zero, and every engine makes its own.
"""

import sys
from pathlib import Path
from typing import Any

from helpers.shapes import NUM_WORDS, SHAPES, make_shape

FILE = "model.safetensors"


def make_weights(
    folder: Path,
    shape: str,
    *,
    device: str = "cuda",
    seed: int = 0,
    has_all_words: bool = False,
) -> Path:
    """Write `shape` with its tokenizer and seeded bfloat16 weights to `folder`, unless there.

    With `has_all_words` each token of the model has a word: text tells answers apart.
    """
    if (folder / FILE).exists():
        return folder
    import torch
    from safetensors.torch import save_file

    words = SHAPES[shape]["vocab_size"] if has_all_words else NUM_WORDS
    make_shape(folder, shape, num_words=words)
    generator = torch.Generator(device=device).manual_seed(seed)
    tensors = {}
    for name, size in tensor_sizes(SHAPES[shape]).items():
        tensor = torch.empty(size, dtype=torch.bfloat16, device=device)
        if len(size) == 1:
            tensor.fill_(1)
        else:
            scale = 1.0 if "embed" in name else size[1] ** -0.5
            tensor.normal_(0, scale, generator=generator)
        tensors[name] = tensor.cpu()
    del tensor
    if device == "cuda":
        torch.cuda.empty_cache()  # what is used of the device is measured in this process
    unfinished = folder / "unfinished"
    save_file(tensors, unfinished, metadata={"format": "pt"})
    unfinished.rename(folder / FILE)
    return folder


def tensor_sizes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the name and size of each tensor of a Llama checkpoint."""
    hidden, inner, words = (
        config[key] for key in ("hidden_size", "intermediate_size", "vocab_size")
    )
    width = config["num_attention_heads"] * config["head_dim"]
    kv_width = config["num_key_value_heads"] * config["head_dim"]
    sizes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (words, hidden),
        "lm_head.weight": (words, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        sizes |= {
            f"{prefix}.self_attn.q_proj.weight": (width, hidden),
            f"{prefix}.self_attn.k_proj.weight": (kv_width, hidden),
            f"{prefix}.self_attn.v_proj.weight": (kv_width, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, width),
            f"{prefix}.mlp.gate_proj.weight": (inner, hidden),
            f"{prefix}.mlp.up_proj.weight": (inner, hidden),
            f"{prefix}.mlp.down_proj.weight": (hidden, inner),
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
        }
    return sizes


if __name__ == "__main__":
    make_weights(Path(sys.argv[1]), sys.argv[2])
