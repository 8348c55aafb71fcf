"""The pages under a SGLang allocator, and the free blocks on them as the tensor that it keeps.

SGLang knows which blocks are free, as a tensor on the device; this knows which pages are open. What
lies on a page is counted only when somebody wants pages back: counting waits for the device.
"""

import time
from collections.abc import Callable
from heapq import heapify, heappop, heappush

import torch

from kvcached_core.engine.pages import NUM_QUIET_PAGES
from kvcached_core.engine.port import PageSource
from kvcached_core.memory.geometry import Geometry
from kvcached_core.memory.orders import PageOrders


class BlockPages:
    """Open pages and promised ones.

    Args:
        geometry: What lies in a page.
        num_pages: Pages of the arena; page 0 is open.
        source: Who promises pages.
        carry_out: Maps what a step needs before it returns, the rest behind its back.
        device: Where SGLang keeps its free list.
        min_spare_pages: While requests are live and fewer pages' worth of blocks are free, pages
            are mapped ahead of need ...
        max_spare_pages: ... until so many are free; empty pages above that go back.
        idle_seconds: How long they stay before.
        num_quiet_pages: Empty pages that stay when no request is left.
        unmapped: The unmapped pages as a heap, where two pools take theirs from the same ones. Then
            page 0 is for the padding block of either, and no other.
        clock: Returns seconds; for tests.
    """

    def __init__(
        self,
        geometry: Geometry,
        num_pages: int,
        source: PageSource,
        carry_out: Callable[[PageOrders], None],
        device: str,
        *,
        min_spare_pages: int = 0,
        max_spare_pages: int = 0,
        idle_seconds: float = 0.0,
        num_quiet_pages: int = NUM_QUIET_PAGES,
        unmapped: list[int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.geometry = geometry
        self.num_pages = num_pages
        self.min_spare_pages = min_spare_pages
        self.max_spare_pages = max(max_spare_pages, min_spare_pages)
        self.idle_seconds = idle_seconds
        self.num_quiet_pages = num_quiet_pages
        self.num_promised = 0
        self._source = source
        self._carry_out = carry_out
        self._device = device
        self._clock = clock
        self.num_padding_blocks = int(unmapped is None)
        self._open = {0} if unmapped is None else set()
        self._spare: list[int] = []  # ordered to be mapped soon; no block of theirs is listed
        self._unmapped = list(range(1, num_pages)) if unmapped is None else unmapped
        heapify(self._unmapped)
        self._surplus_since: float | None = None

    @property
    def num_open_blocks(self) -> int:
        """Blocks on open pages, without the padding block."""
        return len(self._open) * self.geometry.blocks_per_page - self.num_padding_blocks

    @property
    def num_open_pages(self) -> int:
        """Open pages, page 0 included unless it is for padding alone."""
        return len(self._open)

    @property
    def num_ready_blocks(self) -> int:
        """Blocks that `open_blocks` would add without asking anybody."""
        return (len(self._spare) + self.num_promised) * self.geometry.blocks_per_page

    def all_ids(self) -> torch.Tensor:
        """Return the ids of all blocks on open pages, without the padding block."""
        return self._ids_of(sorted(self._open))[self.num_padding_blocks :]

    def reserve_blocks(self, num_blocks: int, *, is_spare: bool = False) -> None:
        """Ask for the pages of so many more blocks than are ready.

        Args:
            num_blocks: What shall be ready.
            is_spare: No request waits for them; otherwise others are asked to give memory.
        """
        self.reserve_pages(self.pages_for(num_blocks), is_spare=is_spare)

    def pages_for(self, num_blocks: int) -> int:
        """Return the pages that are missing until so many more blocks are ready."""
        missing = num_blocks - self.num_ready_blocks
        return max(-(-missing // self.geometry.blocks_per_page), 0)

    def reserve_pages(self, num_pages: int, *, is_spare: bool = False) -> None:
        """Ask for so many pages; see `reserve_blocks`."""
        wanted = min(num_pages, len(self._unmapped) - self.num_promised)
        if wanted > 0 and is_spare:
            self.num_promised += self._source.reserve(0, is_urgent=False, num_spare=wanted)
        elif wanted > 0:
            self.num_promised += self._source.reserve(wanted, is_urgent=True)

    def open_blocks(self, num_blocks: int) -> torch.Tensor:
        """Open pages for up to `num_blocks` blocks, asking for them if need be; return the ids.

        They may be used by the next step.
        """
        self.reserve_blocks(num_blocks)
        orders = PageOrders()
        opened: list[int] = []
        per_page = self.geometry.blocks_per_page
        while len(opened) * per_page < num_blocks and (self._spare or self.num_promised):
            if self._spare:
                page = self._spare.pop(0)
                orders.ready_pages.append(page)
            else:
                page = heappop(self._unmapped)
                self.num_promised -= 1
                orders.map_pages.append(page)
            opened.append(page)
        if opened:
            self._open.update(opened)
            self._carry_out(orders)
        return self._ids_of(opened)

    def map_ahead(self, num_free_blocks: int) -> None:
        """Order spare pages if fewer blocks are free than the low watermark has."""
        per_page = self.geometry.blocks_per_page
        num_free = num_free_blocks // per_page + len(self._spare)
        if num_free >= self.min_spare_pages:
            return
        self.reserve_blocks((self.max_spare_pages - num_free) * per_page, is_spare=True)
        ordered = [heappop(self._unmapped) for _ in range(self.num_promised)]
        self.num_promised = 0
        if ordered:
            self._spare += ordered
            self._carry_out(PageOrders(spare_pages=ordered))

    def cancel(self) -> None:
        """Give back what is promised and was not used."""
        if self.num_promised:
            self._source.cancel(self.num_promised)
            self.num_promised = 0

    def is_surplus_due(self, num_free_blocks: int, *, is_live: bool) -> bool:
        """Return whether there may be empty pages that should go back by now: cheap, and often."""
        kept = self.max_spare_pages if is_live else self.num_quiet_pages
        per_page = self.geometry.blocks_per_page
        if num_free_blocks + len(self._spare) * per_page < (kept + 1) * per_page:
            self._surplus_since = None
            return False
        now = self._clock()
        if self._surplus_since is None:
            self._surplus_since = now
        if now - self._surplus_since < self.idle_seconds:
            return False
        self._surplus_since = now
        return True

    def close(
        self, free_ids: torch.Tensor, max_pages: int, *, keep: int = 0
    ) -> tuple[torch.Tensor, list[int]]:
        """Close up to `max_pages` empty pages, all but `keep` of them.

        Args:
            free_ids: The ids of all free blocks.
            max_pages: The most that shall go.
            keep: Empty pages that stay.

        Returns:
            The ids that are still free, those on the fullest pages first, so that pages empty out;
            and the pages to unmap.
        """
        spare, self._spare = self._spare, []
        num_free = torch.bincount(free_ids // self.geometry.ids_per_page, minlength=self.num_pages)
        counts = num_free.tolist()
        per_page = self.geometry.blocks_per_page
        empty = sorted(page for page in self._open if page and counts[page] == per_page)
        num_kept = max(len(empty) + len(spare) - max_pages, keep, 0)
        closed = [*empty, *spare][num_kept:]
        self._spare = spare[: max(num_kept - len(empty), 0)]
        self._open.difference_update(closed)
        for page in closed:
            heappush(self._unmapped, page)
        return self._sorted(free_ids, num_free, empty[num_kept:]), closed

    def _sorted(
        self, free_ids: torch.Tensor, num_free: torch.Tensor, closed: list[int]
    ) -> torch.Tensor:
        pages = free_ids // self.geometry.ids_per_page
        if closed:
            is_kept = ~torch.isin(pages, torch.tensor(closed, device=pages.device))
            free_ids, pages = free_ids[is_kept], pages[is_kept]
        order = torch.argsort(num_free[pages] * (1 << 31) + free_ids)
        return free_ids[order]

    def _ids_of(self, pages: list[int]) -> torch.Tensor:
        first = torch.tensor(pages, dtype=torch.int64) * self.geometry.ids_per_page
        ids = first[:, None] + torch.arange(self.geometry.blocks_per_page)
        return ids.reshape(-1).to(self._device, non_blocking=True)
