"""The estimate of a longest request, against what the shapes of published models come to."""

import json
from pathlib import Path
from typing import Any

import pytest

from kvcached_core.memory.request_bytes import request_bytes

LLAMA_8B = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}
TOKEN = 128 << 10  # of Llama-3.1-8B, in all of its layers
GEMMA = LLAMA_8B | {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention", "linear_attention", "full_attention"],
    "sliding_window": 100,
}
LATENT = LLAMA_8B | {"num_hidden_layers": 61, "kv_lora_rank": 512, "qk_rope_head_dim": 64}


@pytest.mark.parametrize(
    ("config", "given", "expected"),
    [
        (LLAMA_8B, {}, 131072 * TOKEN),
        (LLAMA_8B, {"max_tokens": 4096}, 4096 * TOKEN),
        (LLAMA_8B, {"max_tokens": 4096, "tensor_parallel": 4}, 4096 * TOKEN // 4),
        (LLAMA_8B, {"max_tokens": 4096, "tensor_parallel": 16}, 4096 * TOKEN // 8),
        (LLAMA_8B | {"torch_dtype": "float32"}, {"max_tokens": 10}, 20 * TOKEN),
        (LLAMA_8B | {"dtype": "torch.float32"}, {"max_tokens": 10}, 20 * TOKEN),
        ({"text_config": LLAMA_8B, "hidden_size": 1}, {"max_tokens": 10}, 10 * TOKEN),
        (LLAMA_8B | {"sliding_window": 100}, {"max_tokens": 1000}, 100 * TOKEN),
        (
            LLAMA_8B | {"sliding_window": 100, "use_sliding_window": False},
            {"max_tokens": 1000},
            1000 * TOKEN,
        ),
        (GEMMA, {"max_tokens": 1000}, (100 + 2 * 1000) * TOKEN // 32),
        (LATENT, {"max_tokens": 1000, "tensor_parallel": 8}, 1000 * 61 * (512 + 64) * 2),
        (LLAMA_8B | {"max_position_embeddings": None}, {}, 0),
        ({"num_hidden_layers": "many"}, {}, 0),
    ],
)
def test_a_longest_request_takes_what_the_layers_keep(
    tmp_path: Path, config: dict[str, Any], given: dict[str, int], expected: int
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert request_bytes(tmp_path, **given) == expected


@pytest.mark.parametrize("text", [None, "{ broken", "[]"])
def test_of_a_model_without_a_configuration_nothing_is_known(
    tmp_path: Path, text: str | None
) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert request_bytes(tmp_path, 4096) == 0
