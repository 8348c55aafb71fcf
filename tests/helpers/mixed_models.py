"""Tiny models whose layers differ in their blocks' size, with weights."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

from kvcached_demo.harness.model import CONFIG, make_model

HEAD_DIM = 128
# Heads of keys and values in each layer: blocks of two sizes, and more planes of one than of the
# other.
KV_HEADS = (8, 2, 2, 2)

# Transformers has no configuration of this kind of model; checkpoints bring theirs along.
CONFIGURATION = """\
from transformers import LlamaConfig


class Words(dict):
    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class DeciLMConfig(LlamaConfig):
    model_type = "nemotron-nas"

    def __init__(self, block_configs=None, **others):
        super().__init__(**others)
        self.block_configs = [
            Words({part: Words(words) for part, words in block.items()})
            for block in block_configs or ()
        ]
"""


def make_mixed_model(
    folder: Path, *, seed: int, kv_heads: Sequence[int] = KV_HEADS, **settings: Any
) -> Path:
    """Write a model like Nemotron-NAS: layers of a Llama with different numbers of heads."""
    make_model(folder, seed=seed)
    num_heads = int(str(CONFIG["num_attention_heads"]))
    blocks: list[dict[str, Any]] = [
        {
            "attention": {"no_op": False, "n_heads_in_group": num_heads // heads},
            "ffn": {"no_op": False, "intermediate_size": CONFIG["intermediate_size"]},
        }
        for heads in kv_heads
    ]
    config = CONFIG | {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "auto_map": {"AutoConfig": "configuration_decilm.DeciLMConfig"},
        "block_configs": blocks,
        **settings,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "configuration_decilm.py").write_text(CONFIGURATION)
    weights = load_file(folder / "model.safetensors")
    for layer, heads in enumerate(kv_heads):
        for part in ("k_proj", "v_proj"):
            name = f"model.layers.{layer}.self_attn.{part}.weight"
            weights[name] = weights[name][: heads * HEAD_DIM].copy()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
