"""An engine's blocks by their sparse ids."""

from collections.abc import Iterator, Sequence
from typing import Generic

from kvcached_core.engine.free_lists import Block
from kvcached_core.memory.geometry import Geometry


class SparseBlocks(Generic[Block]):
    """A pool's blocks by their sparse ids, which they get here; iterating yields those that exist.

    Args:
        blocks: The blocks in the order of their ids. Those that fill no whole page have none.
        geometry: How they lie in pages.
    """

    def __init__(self, blocks: Sequence[Block], geometry: Geometry) -> None:
        self.num_pages = len(blocks) // geometry.blocks_per_page
        self._blocks = blocks[: self.num_pages * geometry.blocks_per_page]
        self._geometry = geometry
        for index, block in enumerate(self._blocks):
            block.block_id = geometry.block_id(index)

    def __len__(self) -> int:
        return self._geometry.num_ids(self.num_pages)

    def __iter__(self) -> Iterator[Block]:
        return iter(self._blocks)

    def __getitem__(self, block_id: int) -> Block:
        page, index = divmod(block_id, self._geometry.ids_per_page)
        if index >= self._geometry.blocks_per_page or page < 0:
            raise IndexError(f"block id {block_id} does not exist")
        return self._blocks[page * self._geometry.blocks_per_page + index]

    def on_page(self, page: int) -> Sequence[Block]:
        """Return the blocks of a page, in the order of their ids."""
        first = page * self._geometry.blocks_per_page
        return self._blocks[first : first + self._geometry.blocks_per_page]
