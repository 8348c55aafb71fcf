"""Full and sliding-window layers that share one pool, as SGLang serves Gemma 3."""

import asyncio
import json
from pathlib import Path

import pytest
import torch
from helpers.sglang_engine import mixed_bursts, start_sglang
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from kvcached_core.cli.demo.model import make_model

pytestmark = [pytest.mark.sglang, pytest.mark.slow, pytest.mark.timeout(400)]

NUM_BURSTS = 4
WINDOW_TOKENS = 64


def make_gemma(folder: Path) -> Path:
    """Write a tiny Gemma 3 with random weights, and a tokenizer, to `folder`."""
    make_model(folder, seed=1)
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=WINDOW_TOKENS,
        layer_types=["sliding_attention"] * 5 + ["full_attention"],
        max_position_embeddings=4096,
    )
    model = Gemma3ForCausalLM(config)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if weights.dim() > 1:
                weights.normal_(0, 1.0 if "embed" in name else weights.shape[1] ** -0.5)
    model.float().save_pretrained(folder)
    file = folder / "config.json"
    named = json.loads(file.read_text()) | {"architectures": ["Gemma3ForCausalLM"]}
    file.write_text(json.dumps(named))
    return folder


def test_tokens_of_a_sliding_window_mix_are_vanillas(tmp_path: Path) -> None:
    model = make_gemma(tmp_path / "gemma")
    servers = [
        start_sglang("elastic", model, tmp_path, "--disable-radix-cache", core=0),
        start_sglang("vanilla", model, tmp_path, "--disable-radix-cache", elastic=False, core=1),
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
        assert "kvcached: process" in servers[0].log.read_text()
    finally:
        for server in servers:
            server.kill()
    assert found[0] == found[1]
    assert {error for error, _ in found[0]} == {None}
