"""Where vLLM captures CUDA graphs: their memory is ours where it goes with the weights."""

from typing import Any

from kvcached_patches.around import around

Pool = tuple[int, int]

_pool: Pool | None = None


def use_graph_pool(pool: Pool | None) -> None:
    """Let vLLM capture its graphs in a pool of ours from now on; None: as it does by itself.

    Args:
        pool: As torch names it.
    """
    global _pool
    before, _pool = _pool, pool
    if before is not None:
        from vllm.platforms import current_platform

        platform = type(current_platform)
        if platform._global_graph_pool == before:
            platform._global_graph_pool = None


@around
def platform_get_global_graph_pool(original: Any, self: Any) -> Any:
    """Wrap `Platform.get_global_graph_pool`: it makes one when it is called first."""
    platform = type(self)
    if _pool is not None and platform._global_graph_pool is None:
        platform._global_graph_pool = _pool
    return original(self)
