"""SGLang's list of free blocks over elastic pages: only blocks of open pages are in it."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvcached_core.engine.counted_blocks import CountedBlocks
from kvcached_core.engine.pages import Pages

if TYPE_CHECKING:
    from kvcached_sglang.engine import SglangEngine


class FreeList(CountedBlocks):
    """The free list of one allocator, whose own code takes from it and gives to it.

    SGLang calls a block a page; what it calls a size counts tokens.

    Args:
        allocator: SGLang's allocator.
        count_tokens: Returns the tokens in its list, as SGLang counts them.
        make_pages: Returns the pages that the blocks are on.
        engine: The engine.
        number: Which of the engine's pools this is.
    """

    def __init__(
        self,
        allocator: Any,
        count_tokens: Callable[[], int],
        make_pages: Callable[[CountedBlocks], Pages],
        engine: "SglangEngine",
        number: int,
    ) -> None:
        self.block_tokens: int = allocator.page_size
        self._allocator = allocator
        self._count_tokens = count_tokens
        super().__init__(
            make_pages,
            engine.ranks,
            engine.giving,
            lambda: engine.port.num_unneeded_blocks(number),
        )

    @property
    def num_free_blocks(self) -> int:
        """See `CountedBlocks.num_free_blocks`."""
        return self._count_tokens() // self.block_tokens

    @property
    def num_blocks(self) -> int:
        """See `CountedBlocks.num_blocks`."""
        return int(self._allocator.size) // self.block_tokens

    @property
    def free_ids(self) -> Any:
        """See `CountedBlocks.free_ids`."""
        return self._allocator.free_pages

    @free_ids.setter
    def free_ids(self, ids: Any) -> None:
        self._allocator.free_pages = ids

    def gather(self) -> None:
        """See `CountedBlocks.gather`."""
        self._allocator.merge_and_sort_free()
