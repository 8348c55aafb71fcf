"""Layers that keep only the last tokens, beside vLLM's connector.

Such a layer gives blocks back while their request runs. vLLM most often stores a block with the
step that fills it. It does so later where its tier had no room then, and where the end of a request
makes a block worth storing. By then the block is free, and vLLM forgets it only when a request gets
it. Here its page may go before that, so vLLM is made to forget it with the page.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from kvcached_core.errors import UnsupportedEngineError
from kvcached_core.memory.geometry import Geometry

NULL_BLOCK = 0  # what vLLM's connector takes for a block that is not to be stored


def has_windows(kv_cache_config: Any) -> bool:
    """Return whether there are layers that give blocks back while their request runs."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    return not all(isinstance(kind, FullAttentionSpec) for kind in _kinds(kv_cache_config))


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


def forget_closed(core: Any, geometry: Geometry) -> Callable[[Sequence[int]], None]:
    """Return what makes the connector of an engine core forget the blocks of closed pages.

    The other blocks of a chunk of the host tier are worth nothing without one of them.
    """
    ids_per_page, page_blocks = geometry.ids_per_page, geometry.blocks_per_page

    def forget(pages: Sequence[int]) -> None:
        connector = core.scheduler.connector.connector_scheduler
        chunk_blocks: int = connector.config.blocks_per_chunk
        gone = {page * ids_per_page + number for page in pages for number in range(page_blocks)}
        for request in connector._req_status.values():
            for group in request.group_states:
                block_ids: list[int] = group.block_ids
                if gone.isdisjoint(block_ids):
                    continue
                for number in [at for at, each in enumerate(block_ids) if each in gone]:
                    first = number - number % chunk_blocks
                    chunk = slice(first, first + chunk_blocks)
                    block_ids[chunk] = [NULL_BLOCK] * len(block_ids[chunk])

    return forget


def _kinds(kv_cache_config: Any) -> Iterator[Any]:
    for group in kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        yield from getattr(spec, "kv_cache_specs", {"": spec}).values()
