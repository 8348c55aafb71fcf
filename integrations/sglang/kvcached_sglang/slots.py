"""SGLang's list of free states over elastic pages; imported once SGLang has made one."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sglang.srt.mem_cache.allocator.mamba import MambaSlotAllocator

from kvcached_core.engine.counted_blocks import CountedBlocks
from kvcached_core.engine.pages import Pages

if TYPE_CHECKING:
    from kvcached_sglang.engine import SglangEngine


class SlotList(CountedBlocks):
    """The free slots of one allocator, whose own code takes from them and gives to them.

    Args:
        allocator: SGLang's allocator.
        make_pages: Returns the pages that the slots are on.
        engine: The engine.
        number: Which of the engine's pools this is.
    """

    def __init__(
        self,
        allocator: Any,
        make_pages: Callable[[CountedBlocks], Pages],
        engine: "SglangEngine",
        number: int,
    ) -> None:
        self._allocator = allocator
        super().__init__(
            make_pages,
            engine.ranks,
            engine.giving,
            lambda: engine.port.num_cached_blocks(number),
        )

    @property
    def num_free_blocks(self) -> int:
        """See `CountedBlocks.num_free_blocks`."""
        return len(self._allocator.free_slots)

    @property
    def num_blocks(self) -> int:
        """See `CountedBlocks.num_blocks`."""
        return int(self._allocator.size)

    @property
    def free_ids(self) -> Any:
        """See `CountedBlocks.free_ids`."""
        return self._allocator.free_slots

    @free_ids.setter
    def free_ids(self, ids: Any) -> None:
        self._allocator.free_slots = ids

    def gather(self) -> None:
        """See `CountedBlocks.gather`: nothing is kept beside."""


class ElasticSlotAllocator(MambaSlotAllocator):
    """Slots of open pages."""

    free_list: SlotList

    def available_size(self) -> int:
        """Return the slots that can be had without evicting."""
        return self.free_list.num_available_blocks()

    def alloc_group_begin(self, num_reqs: int) -> None:
        """Take none ahead: a slot for each request that waits would open pages for nothing."""
        super().alloc_group_begin(min(num_reqs, 0))

    def _do_alloc(self, need_size: int) -> Any:
        self.free_list.open(need_size)
        return super()._do_alloc(need_size)

    def clear(self) -> None:
        """Make every slot free."""
        self.free_list.fill()


def make_elastic(
    allocator: Any,
    make_pages: Callable[[CountedBlocks], Pages],
    engine: "SglangEngine",
    number: int,
) -> SlotList:
    """Let an allocator that SGLang made hand out the slots of open pages alone.

    Args:
        allocator: SGLang's allocator.
        make_pages: See `SlotList`.
        engine: See `SlotList`.
        number: See `SlotList`.
    """
    allocator.free_list = SlotList(allocator, make_pages, engine, number)
    pages = allocator.free_list.pages
    allocator.size = pages.geometry.num_ids(pages.num_pages) - 1
    allocator.__class__ = ElasticSlotAllocator
    return allocator.free_list
