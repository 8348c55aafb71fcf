"""The image: the arena of a rank's weights, of which the first so many pages are resident."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from kvcached_core.errors import PageStateError
from kvcached_core.memory.arena import Arena
from kvcached_core.memory.geometry import Geometry
from kvcached_core.memory.vmm.backend import Backend
from kvcached_core.weights.host_bytes import MAX_COPY_BYTES
from kvcached_core.weights.layout import Layout, Piece

if TYPE_CHECKING:
    import torch


class Image:
    """Addresses for all of a rank's weights; at first no page is there.

    One thread at a time may map and drop. What is resident are always the first pages, also after
    a failure, so their number says all.

    Args:
        backend: Where addresses and memory come from.
        layout: What lies where.

    Raises:
        BackendError: If the addresses cannot be reserved.
    """

    def __init__(self, backend: Backend, layout: Layout) -> None:
        self.backend = backend
        self.layout = layout
        geometry = Geometry(layout.page_bytes, num_planes=1, ids_per_page=1, blocks_per_page=1)
        self.arena = Arena(backend, geometry, layout.num_pages, is_zeroed=False)
        self._num_zeroed = 0
        self._whole: torch.Tensor | None = None

    @property
    def num_pages(self) -> int:
        """Pages of the image."""
        return self.layout.num_pages

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        return self.layout.page_bytes

    @property
    def num_resident_pages(self) -> int:
        """How many pages are resident: the first ones."""
        return self.arena.resident_bytes // self.page_bytes

    def map_next(self, num_pages: int) -> None:
        """Map that many more pages: all of them, or none.

        What is in them the caller has to bring. Only what was never mapped before is zeros: so what
        lies between parameters, and behind the last one, is the same in every process.

        Raises:
            PageStateError: If there are not so many more.
            BackendError: If the backend fails.
        """
        first = self.num_resident_pages
        if not 0 <= num_pages <= self.num_pages - first:
            raise PageStateError(
                f"map of {num_pages} pages of an image that lacks {self.num_pages - first}"
            )
        end = first + num_pages
        self.arena.map(range(first, end))
        new = max(first, self._num_zeroed)
        if new < end:
            try:
                self.backend.zero(self.page_address(new), (end - new) * self.page_bytes)
                self.backend.synchronize()
            except BaseException:
                self.arena.take_back(range(first, end))
                raise
            self._num_zeroed = end

    def drop_last(self, num_pages: int) -> None:
        """Unmap that many pages, the last first; their content is lost.

        A failure leaves the page that failed, and those in front of it, mapped.

        Raises:
            PageStateError: If not so many are resident.
            BackendError: If the backend fails.
        """
        end = self.num_resident_pages
        if not 0 <= num_pages <= end:
            raise PageStateError(f"drop of {num_pages} pages of an image that has {end}")
        self.arena.unmap(range(end - 1, end - num_pages - 1, -1))

    def copy_from(self, host_address_of: Callable[[int], int], page: int) -> None:
        """Begin to copy host bytes to a page, in pieces that others' copies get in between.

        Args:
            host_address_of: Returns where the bytes of a page are.
            page: Its number.

        Raises:
            BackendError: If the backend fails; some pieces may be on their way.
        """
        address, host_address = self.page_address(page), host_address_of(page)
        page_bytes = self.page_bytes
        for begin in range(0, page_bytes, MAX_COPY_BYTES):
            num_bytes = min(MAX_COPY_BYTES, page_bytes - begin)
            self.backend.copy_in(address + begin, host_address + begin, num_bytes)

    def page_address(self, page: int) -> int:
        """Return where `page` begins."""
        return self.arena.address + page * self.page_bytes

    def tensor(self, piece: Piece) -> "torch.Tensor":
        """Return an int8 tensor over exactly the bytes of `piece`, without touching them."""
        return self.backend.tensor(self.arena.address + piece.offset_bytes, piece.num_bytes)

    def pages_tensor(self, first: int, num_pages: int) -> "torch.Tensor":
        """Return an int8 tensor over a run of pages, without touching them."""
        if self._whole is None:
            self._whole = self.arena.tensor()
        start = first * self.page_bytes
        return self._whole[start : start + num_pages * self.page_bytes]

    def close(self) -> None:
        """Drop all pages and free the addresses. No tensor over them may be used any more."""
        self._whole = None
        self.arena.close()
