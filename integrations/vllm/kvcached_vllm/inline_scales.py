"""Caches that keep a scale beside each token's head, in the bytes of the block itself.

Before a layer's first step vLLM makes views of these scales, and fills those of all blocks with 1.
Here most blocks are not mapped. What it fills is never read: a step writes a token's scales with
its keys and values, and attention leaves those of other tokens out. In vanilla, too, a block that
is used again has the scales of who had it before.
"""

import functools
from collections.abc import Callable
from typing import Any

from kvcached_patches.around import OURS

VIEWS = ("_k_scale_cache", "_v_scale_cache")


def mark_layers(worker: Any, memory: Any) -> None:
    """Let the attention of a worker's layers know that what it reads lies in our pages."""
    for layer in worker.vllm_config.compilation_config.static_forward_context.values():
        attention = getattr(layer, "impl", None)
        if hasattr(attention, VIEWS[0]):
            setattr(attention, OURS, memory)


def ensure_scale_caches(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap `TritonAttentionImpl._ensure_scale_caches`: only the null block's scales are filled.

    vLLM makes the views of that block, which is always mapped. They become as long as the ids are.
    """

    @functools.wraps(original)
    def wrapper(self: Any, kv_cache: Any) -> None:
        if self._k_scale_cache is not None or not hasattr(self, OURS):
            original(self, kv_cache)
            return
        original(self, kv_cache[:1])
        for name in VIEWS:
            view = getattr(self, name)
            long = view.as_strided(
                (kv_cache.shape[0], *view.shape[1:]), view.stride(), view.storage_offset()
            )
            setattr(self, name, long)

    return wrapper
