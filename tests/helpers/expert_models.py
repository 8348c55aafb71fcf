"""A tiny model with experts: data-parallel ranks of such a one compute each step together."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from kvcached_demo.harness.model import CONFIG, make_model

NUM_EXPERTS = 4
WEIGHTS = "model.safetensors"
# What a Llama's feed-forward layer is made of, by the names that Mixtral's experts have for it.
PARTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": NUM_EXPERTS,
    "num_experts_per_tok": 2,
    "sliding_window": None,
}


def make_expert_model(folder: Path, *, seed: int) -> Path:
    """Write a model of random weights whose layers have experts, and its tokenizer, to `folder`."""
    make_model(folder, seed=seed)
    weights = load_file(folder / WEIGHTS)
    random = np.random.default_rng(seed)
    made = {name: weight for name, weight in weights.items() if ".mlp." not in name}
    for layer in range(CONFIG["num_hidden_layers"]):
        old, new = f"model.layers.{layer}.mlp.", f"model.layers.{layer}.block_sparse_moe."
        shape = (NUM_EXPERTS, CONFIG["hidden_size"])
        made[f"{new}gate.weight"] = np.asarray(random.standard_normal(shape), np.float32)
        for expert in range(NUM_EXPERTS):
            for part, name in PARTS.items():
                one = weights[f"{old}{name}.weight"]
                noise = random.standard_normal(one.shape) * one.std()
                made[f"{new}experts.{expert}.{part}.weight"] = np.asarray(one + noise, np.float32)
    save_file(made, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG | MIXTRAL, indent=2))
    return folder
