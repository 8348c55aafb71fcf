"""The block pool of an engine that copies its blocks to the host."""

from collections.abc import Iterable
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock

from kvcached_core.engine.copied import CopiedBlocks
from kvcached_vllm.block_pool import ElasticBlockPool


class OffloadedBlockPool(ElasticBlockPool):
    """An `ElasticBlockPool` that says which blocks were freed: a copy of them may yet begin.

    Args:
        *args: As `ElasticBlockPool`.
        num_host_blocks: The blocks that the host tier has room for.
        **kwargs: As `args`.
    """

    def __init__(self, *args: Any, num_host_blocks: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._note_freed = self.pages.freed_ids.extend
        self.copied = CopiedBlocks(num_host_blocks)
        self.is_copied = lambda block: self.copied.has(block.block_id, block.block_hash)

    def hold(self, block_ids: Iterable[int], job_id: int) -> None:
        """Keep the pages of blocks that a job copies; a neighbour gets these first afterwards."""
        ids = [int(block_id) for block_id in block_ids]
        self.pages.hold(ids, job_id)
        self.copied.begin(job_id, [(each, self.blocks[each].block_hash) for each in ids])

    def free_blocks(
        self,
        ordered_blocks: Iterable[KVCacheBlock],
        prepend: bool = False,  # noqa: FBT001, FBT002  only 0.23 has it
    ) -> None:
        """See `ElasticBlockPool`."""
        blocks = list(ordered_blocks)
        super().free_blocks(blocks, prepend)
        self._note_freed([block.block_id for block in blocks if not block.ref_cnt])
