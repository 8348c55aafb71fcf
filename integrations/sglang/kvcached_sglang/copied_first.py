"""What of SGLang's prefix cache goes first: what the host tier has as well."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sglang.srt.mem_cache.base_prefix_cache import EvictParams


def drop(tree_cache: Any, num_tokens: int) -> None:
    """Drop cached tokens, the longest unused first; where there is a host tier, what it has first.

    The rest is computed again later, or is copied before it goes, and a neighbour waits for that.
    What SGLang takes itself stays in its own order.

    Args:
        tree_cache: SGLang's.
        num_tokens: About how many.
    """
    if getattr(tree_cache, "cache_controller", None) is None:
        tree_cache.evict(EvictParams(num_tokens=num_tokens))
    elif hasattr(tree_cache, "is_backuped"):
        with _passing_over_the_rest(tree_cache):
            result = tree_cache.evict(EvictParams(num_tokens=num_tokens))
        num_tokens -= result.num_tokens_evicted
        if num_tokens > 0:
            tree_cache.evict(EvictParams(num_tokens=num_tokens))
    else:
        with _putting_the_rest_last(tree_cache):
            tree_cache.evict(EvictParams(num_tokens=num_tokens))


@contextmanager
def _passing_over_the_rest(tree_cache: Any) -> Iterator[None]:
    """Have an eviction in the block keep the leaves that are not in the host tier."""
    evict = tree_cache._evict_device_leaf

    def evict_copied(node: Any, *args: Any, **kwargs: Any) -> Any:
        return evict(node, *args, **kwargs) if tree_cache.is_backuped(node) else None

    tree_cache._evict_device_leaf = evict_copied
    try:
        yield
    finally:
        del tree_cache._evict_device_leaf


class _RestLast:
    """A strategy of SGLang's in which nodes that are not in the host tier come last."""

    def __init__(self, strategy: Any) -> None:
        self._strategy = strategy

    def get_priority(self, node: Any) -> tuple[bool, Any]:
        """Return what nodes are sorted by: the lowest goes first."""
        return not node.backuped, self._strategy.get_priority(node)


@contextmanager
def _putting_the_rest_last(tree_cache: Any) -> Iterator[None]:
    """As above, for the trees of older releases (up to 0.5.18)."""
    strategy = tree_cache.eviction_strategy
    tree_cache.eviction_strategy = _RestLast(strategy)
    try:
        yield
    finally:
        tree_cache.eviction_strategy = strategy
