"""Layers that keep only the last tokens, beside vLLM's connector: which there are, and may be."""

import sys
from collections.abc import Iterator
from typing import Any

from kvcached_core.errors import UnsupportedEngineError


def refuse_unknown(kv_cache_config: Any) -> None:
    """Refuse layers beside a connector that keep neither tokens nor the last of them.

    Raises:
        UnsupportedEngineError: If there are such layers.
    """
    from vllm.v1.kv_cache_interface import (
        ChunkedLocalAttentionSpec,
        FullAttentionSpec,
        MambaSpec,
        SlidingWindowSpec,
    )

    served: tuple[type, ...] = (FullAttentionSpec, SlidingWindowSpec, ChunkedLocalAttentionSpec)
    for kind in _kinds(kv_cache_config):
        if isinstance(kind, MambaSpec):
            raise UnsupportedEngineError(
                "KV offloading of states (Mamba, linear attention): vLLM alone gave other answers "
                "from states that came back; remove --kv-offloading-size"
            )
        if not isinstance(kind, served):
            raise UnsupportedEngineError(
                f"KV offloading of layers with a {type(kind).__name__}: vLLM's connector has no "
                "rule for these; remove --kv-offloading-size"
            )


def hit_blocks(kv_cache_config: Any) -> dict[int, int]:
    """Return how many blocks a hit may load of each group with such layers, by the group's number.

    It ends with a chunk of the host tier, or with the last token but one of its request: there
    blocks of the window are enough. Where groups differ in the tokens of a block, it may end inside
    another group's chunk; then it may load all in front of that.
    """
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    groups = kv_cache_config.kv_cache_groups
    is_uniform = len({group.kv_cache_spec.block_size for group in groups}) == 1
    found = {}
    for number, group in enumerate(groups):
        windows = [kind for kind in _kinds_of(group) if not isinstance(kind, FullAttentionSpec)]
        if windows:
            found[number] = max(map(_window_blocks, windows)) if is_uniform else sys.maxsize
    return found


def _window_blocks(kind: Any) -> int:
    num_tokens = getattr(kind, "attention_chunk_size", 0) or kind.sliding_window
    num_tokens += getattr(kind, "extra_retained_tokens", 0)
    return -(-num_tokens // kind.block_size)


def _kinds(kv_cache_config: Any) -> Iterator[Any]:
    for group in kv_cache_config.kv_cache_groups:
        yield from _kinds_of(group)


def _kinds_of(group: Any) -> Iterator[Any]:
    spec = group.kv_cache_spec
    yield from getattr(spec, "kv_cache_specs", {"": spec}).values()
