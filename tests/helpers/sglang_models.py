"""Tiny models whose KV cache is not keys and values of one kind for each layer, with weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LagunaConfig,
    LagunaForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from helpers.shapes import SHAPES
from kvcached_demo.harness.model import make_model

WINDOW_TOKENS = 64
SHORT_WINDOW_TOKENS = 16

LAYERS = ["sliding_attention"] * 5 + ["full_attention"]
MIX: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": len(LAYERS),
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "sliding_window": WINDOW_TOKENS,
    "layer_types": LAYERS,
    "max_position_embeddings": 4096,
}
# Served soon where kernels are interpreted: a step costs what it has of heads and blocks of tokens.
SMALL_MIX = MIX | {
    "num_hidden_layers": 2,
    "layer_types": LAYERS[-2:],
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "sliding_window": SHORT_WINDOW_TOKENS,
}
# SGLang's kernels know latents of these sizes; on a CPU it asks for a scaled rotary embedding.
LATENT: dict[str, Any] = SHAPES["mla"] | {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "first_k_dense_replace": 2,
    "rope_scaling": {
        "rope_type": "yarn",
        "type": "yarn",
        "rope_theta": 10000.0,
        "factor": 2.0,
        "original_max_position_embeddings": 2048,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    },
}
# Layers of keys and values, and layers of a short convolution with a state for each request.
HYBRID: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 1024,
    "intermediate_size": 256,
    "block_auto_adjust_ff_dim": False,
    "num_hidden_layers": 6,
    "layer_types": ["conv", "full_attention", "full_attention"] * 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "conv_L_cache": 3,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
# The convolutions' kernel is interpreted, attention is not: the states are small, and blocks large.
SMALL_HYBRID = HYBRID | {
    "hidden_size": 256,
    "num_hidden_layers": 10,
    "layer_types": ["conv", *["full_attention"] * 4] * 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}

# Ranks that have nothing to compute come to each step, too: SGLang's Llama cannot.
QWEN: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,  # as many bytes a token as a tiny Llama
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}


def gemma() -> Any:
    """Return a tiny Gemma 3."""
    return Gemma3ForCausalLM(Gemma3TextConfig(**MIX, query_pre_attn_scalar=32))


def laguna(mix: dict[str, Any] = MIX) -> Any:
    """Return a tiny Laguna without experts."""
    layers = ["dense"] * mix["num_hidden_layers"]
    return LagunaForCausalLM(LagunaConfig(**mix, mlp_layer_types=layers))


def small_laguna() -> Any:
    """Return one of two layers and a short window, which is served soon by interpreted kernels."""
    return laguna(SMALL_MIX)


def deepseek() -> Any:
    """Return a tiny DeepSeek-V2 without experts: latent keys and values (MLA)."""
    return DeepseekV2ForCausalLM(DeepseekV2Config(**LATENT))


def lfm2() -> Any:
    """Return a tiny LFM2: attention and short convolutions by turns."""
    return Lfm2ForCausalLM(Lfm2Config(**HYBRID))


def small_lfm2() -> Any:
    """Return a narrow one, which is served soon by interpreted kernels."""
    return Lfm2ForCausalLM(Lfm2Config(**SMALL_HYBRID))


def qwen3(**changes: Any) -> Any:
    """Return a tiny Qwen3."""
    return Qwen3ForCausalLM(Qwen3Config(**QWEN | changes))


def qwen3_moe() -> Any:
    """Return a tiny Qwen3 with experts."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**QWEN, **experts))


def save(make: Callable[[], Any], folder: Path) -> Path:
    """Write a model with random weights, and a tokenizer, to `folder`."""
    make_model(folder, seed=1)
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if weights.dim() > 1:
                weights.normal_(0, 1.0 if "embed" in name else weights.shape[1] ** -0.5)
    model.float().save_pretrained(folder)
    file = folder / "config.json"
    named = json.loads(file.read_text()) | {"architectures": [type(model).__name__]}
    file.write_text(json.dumps(named))
    return folder
