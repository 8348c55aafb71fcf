"""A LoRA adapter for the tiny model, made on the spot."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

RANK = 8
SHAPES = {
    "self_attn.q_proj": (128, 1024),
    "self_attn.v_proj": (128, 1024),
    "mlp.down_proj": (256, 128),
}


def make_adapter(folder: Path, model: Path, *, seed: int = 3) -> Path:
    """Write an adapter of random weights, large enough that answers differ, to `folder`."""
    folder.mkdir()
    source = np.random.default_rng(seed)
    tensors = {}
    for layer in range(4):
        for name, (num_inputs, num_outputs) in SHAPES.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            down = source.standard_normal((RANK, num_inputs), dtype=np.float32)
            up = source.standard_normal((num_outputs, RANK), dtype=np.float32)
            tensors |= {f"{prefix}.lora_A.weight": down / 3, f"{prefix}.lora_B.weight": up / 3}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "bias": "none",
        "target_modules": [name.rpartition(".")[2] for name in SHAPES],
        "base_model_name_or_path": str(model),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
