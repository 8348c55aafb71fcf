"""Full and sliding-window layers that share one pool: SGLang's own choice, or ours.

SGLang serves Gemma 3 from one pool and Laguna from two, of which our flag makes one. Vanilla is
told to: on a CPU SGLang 0.5.15 reads the window's pool at ids of the other one, and ends.
"""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.sglang_engine import mixed_bursts, start_sglang
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LagunaConfig,
    LagunaForCausalLM,
)

from kvcached_core.cli.demo.model import make_model

pytestmark = [pytest.mark.sglang, pytest.mark.slow, pytest.mark.timeout(400)]

NUM_BURSTS = 4
WINDOW_TOKENS = 64

LAYERS = ["sliding_attention"] * 5 + ["full_attention"]
SIZES: dict[str, Any] = {
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


def gemma() -> Any:
    """Return a tiny Gemma 3."""
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, query_pre_attn_scalar=32))


def laguna() -> Any:
    """Return a tiny Laguna without experts."""
    return LagunaForCausalLM(LagunaConfig(**SIZES, mlp_layer_types=["dense"] * len(LAYERS)))


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


@pytest.mark.parametrize("make", [gemma, laguna])
def test_tokens_of_a_sliding_window_mix_are_vanillas(
    tmp_path: Path, make: Callable[[], Any]
) -> None:
    model = save(make, tmp_path / "model")
    servers = [
        start_sglang("elastic", model, tmp_path, "--disable-radix-cache", core=0),
        start_sglang(
            "vanilla",
            model,
            tmp_path,
            *("--disable-radix-cache", "--disable-hybrid-swa-memory"),
            elastic=False,
            core=1,
        ),
    ]
    bursts = mixed_bursts()[:NUM_BURSTS]
    assert max(len(prompt) for burst in bursts for prompt in burst.prompts) > WINDOW_TOKENS
    try:
        for server in servers:
            server.wait_ready()
        found = [
            [
                (completion.error, completion.token_ids)
                for burst in bursts
                for completion in asyncio.run(server.send(burst))
            ]
            for server in servers
        ]
        logs = [server.log.read_text() for server in servers]
    finally:
        for server in servers:
            server.kill()
    assert "kvcached: process" in logs[0]
    assert ["swa size" in log for log in logs] == [False, False]
    assert found[0] == found[1]
    assert {error for error, _ in found[0]} == {None}
