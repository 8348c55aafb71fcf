"""How many bytes the KV cache of a model's longest request takes: from its configuration.

An estimate for a model that never ran. Whoever runs it knows better.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kvcached_core.memory.model_shape import ELEMENT_BYTES, text_config

LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
KEEPS_ALL, KEEPS_WINDOW = "full_attention", ("sliding_attention", "chunked_attention")


def request_bytes(folder: Path, max_tokens: int | None = None, tensor_parallel: int = 1) -> int:
    """Return what the longest request of a model takes on a rank, in bytes.

    Args:
        folder: Where its `config.json` is.
        max_tokens: The most tokens that its engine lets a request have; None is what it can.
        tensor_parallel: How many ranks share its heads.

    Returns:
        0 where the configuration cannot be read, or does not say it.
    """
    try:
        whole = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return 0
    text = text_config(whole)
    if not isinstance(whole, Mapping) or not isinstance(text, Mapping):
        return 0
    dtype = str(text.get("dtype") or text.get("torch_dtype") or whole.get("torch_dtype") or "")
    element_bytes = ELEMENT_BYTES.get(dtype.removeprefix("torch."), 2)
    num_tokens = max_tokens or next(filter(None, (_number(text, name) for name in LENGTHS)), 0)
    num_kept = sum(_kept_tokens(text, num_tokens))
    return num_kept * _token_elements(text, tensor_parallel) * element_bytes


def _kept_tokens(text: Mapping[str, Any], num_tokens: int) -> Iterator[int]:
    """Yield of how many tokens each layer keeps keys and values."""
    window = _number(text, "sliding_window") or _number(text, "attention_chunk_size")
    kinds = text.get("layer_types")
    if isinstance(kinds, list):
        for kind in kinds:
            if kind == KEEPS_ALL:
                yield num_tokens
            elif kind in KEEPS_WINDOW:
                yield min(num_tokens, window or num_tokens)
        return
    is_windowed = window and text.get("use_sliding_window", True)
    kept = min(num_tokens, window) if is_windowed else num_tokens
    yield from [kept] * _number(text, "num_hidden_layers")


def _token_elements(text: Mapping[str, Any], tensor_parallel: int) -> int:
    """Return how many elements a layer keeps of one token on a rank."""
    if latent := _number(text, "kv_lora_rank"):
        return latent + _number(text, "qk_rope_head_dim")
    num_heads = _number(text, "num_attention_heads")
    head = _number(text, "head_dim") or _number(text, "hidden_size") // max(num_heads, 1)
    num_kv_heads = _number(text, "num_key_value_heads") or num_heads
    return 2 * head * -(-num_kv_heads // tensor_parallel)


def _number(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    return value if isinstance(value, int) and value > 0 else 0
