"""SGLang's two allocators over elastic pages; imported once SGLang has built one of them.

An allocator that SGLang built becomes one of these (`make_elastic`), so each adds methods to one
class of SGLang's and nothing else.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

try:
    from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
    from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
except ModuleNotFoundError:  # one module up to 0.5.12
    from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator, TokenToKVPoolAllocator

from kvcached_core.engine.counted_blocks import CountedBlocks
from kvcached_core.engine.pages import Pages
from kvcached_sglang.free_list import FreeList

if TYPE_CHECKING:
    from kvcached_sglang.engine import SglangEngine


class ElasticTokenAllocator(TokenToKVPoolAllocator):
    """Blocks of one token."""

    free_list: FreeList

    def available_size(self) -> int:
        """Return the tokens that can be had without evicting."""
        return self.free_list.num_available_blocks() * self.page_size

    def alloc(self, need_size: int) -> Any:
        """Return `need_size` token ids, or None if there are not as many."""
        self.free_list.open(need_size)
        return super().alloc(need_size)

    def clear(self) -> None:
        """Make every block free."""
        super().clear()
        self.free_list.fill()


class ElasticPagedAllocator(PagedTokenToKVPoolAllocator):
    """Blocks of several tokens."""

    free_list: FreeList

    def available_size(self) -> int:
        """Return the tokens that can be had without evicting."""
        return self.free_list.num_available_blocks() * self.page_size

    def alloc(self, need_size: int) -> Any:
        """Return the ids of whole blocks for `need_size` tokens, or None."""
        self.free_list.open(need_size // self.page_size)
        return super().alloc(need_size)

    def alloc_extend(
        self,
        prefix_lens: torch.Tensor,
        prefix_lens_cpu: torch.Tensor,
        seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Return token ids for prompts that grow from one length to another, or None."""
        last = self.page_size - 1
        before, after = (prefix_lens_cpu + last), (seq_lens_cpu + last)
        self.free_list.open(int((after // self.page_size - before // self.page_size).sum()))
        return super().alloc_extend(
            prefix_lens, prefix_lens_cpu, seq_lens, seq_lens_cpu, *args, **kwargs
        )

    def alloc_decode(
        self, seq_lens: torch.Tensor, seq_lens_cpu: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Return a token id for the next token of each request, or None."""
        self.free_list.open(int((seq_lens_cpu % self.page_size == 1).sum()))
        return super().alloc_decode(seq_lens, seq_lens_cpu, *args, **kwargs)

    def clear(self) -> None:
        """Make every block free."""
        super().clear()
        self.free_list.fill()


ELASTIC = {
    TokenToKVPoolAllocator: ElasticTokenAllocator,
    PagedTokenToKVPoolAllocator: ElasticPagedAllocator,
}


def make_elastic(
    allocator: Any,
    make_pages: Callable[[CountedBlocks], Pages],
    engine: "SglangEngine",
    number: int,
) -> FreeList:
    """Let an allocator that SGLang built hand out the blocks of open pages alone.

    Args:
        allocator: SGLang's allocator.
        make_pages: See `FreeList`.
        engine: See `FreeList`.
        number: See `FreeList`.
    """
    engines = type(allocator)
    count_tokens = partial(engines.available_size, allocator)
    allocator.free_list = FreeList(allocator, count_tokens, make_pages, engine, number)
    allocator.__class__ = ELASTIC[engines]
    return allocator.free_list
