"""One reserved range of addresses and the pages mapped in it."""

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from kvcached_core.errors import BackendError, PageStateError
from kvcached_core.ledger.times import Meter
from kvcached_core.memory.geometry import Geometry
from kvcached_core.memory.vmm.backend import Backend, Handle

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("kvcached")


class Arena:
    """Addresses for `num_pages` pages, of which any may be mapped at a time.

    Different threads may map and unmap different pages. `maps` and `unmaps` say how long that took.

    Args:
        backend: Where addresses and memory come from.
        geometry: The size of a page and what lies in it.
        num_pages: Pages of the reservation: the pool's virtual size.
        is_zeroed: Whether pages are zeroed when they are mapped; not needed where all of a page is
            written before any of it is read.

    Raises:
        GeometryError: If the block ids would not fit 31 bits.
        BackendError: If the range cannot be reserved.
    """

    def __init__(
        self, backend: Backend, geometry: Geometry, num_pages: int, *, is_zeroed: bool = True
    ) -> None:
        geometry.check_ids(num_pages)
        self.backend = backend
        self.geometry = geometry
        self.num_pages = num_pages
        self.num_bytes = geometry.reserved_bytes(num_pages)
        self.address = backend.reserve(self.num_bytes)
        self.maps, self.unmaps = Meter(), Meter()
        self._is_zeroed = is_zeroed
        self._handles: dict[int, Handle] = {}
        self._loose: list[Handle] = []  # not mapped; there only while a release fails
        self._kept: dict[int, Handle] = {}  # mapped, not resident; only while undoing a map fails

    @property
    def arenas(self) -> "tuple[Arena, ...]":
        """Itself; see `JoinedArenas`."""
        return (self,)

    @property
    def resident_pages(self) -> list[int]:
        """The mapped pages, in the order they were mapped."""
        return list(self._handles)

    @property
    def resident_bytes(self) -> int:
        """Bytes of the mapped pages."""
        return len(self._handles) * self.geometry.page_bytes

    def is_resident(self, page: int) -> bool:
        """Return whether `page` is mapped."""
        return page in self._handles

    def handle(self, page: int) -> Handle:
        """Return the memory of a mapped page."""
        return self._handles[page]

    def map(self, pages: Iterable[int]) -> None:
        """Map `pages`, all of them or none, and begin to zero them (see `Backend.zero`) if told so.

        Raises:
            PageStateError: If a page is mapped already or outside the arena.
            BackendError: If the backend fails; what this call mapped before is taken back.
        """
        done: list[int] = []
        try:
            for page in pages:
                self._map_page(page)
                done.append(page)
            for offset, num_bytes in self._ranges_of(done) if self._is_zeroed else ():
                self.backend.zero(self.address + offset, num_bytes)
        except BaseException:
            self.take_back(done)
            raise

    def take_back(self, pages: Sequence[int]) -> None:
        """Undo a map: `pages` are not resident then, whatever fails.

        What cannot be unmapped is left to who maps the page the next time, or goes with the arena.
        """
        with contextlib.suppress(BackendError):
            self.backend.synchronize()  # their zeros may be under way
        for page in reversed(pages):
            try:
                self.unmap([page])
            except BackendError:
                logger.exception("kvcached: page %d could not be taken back", page)
                if page in self._handles:
                    self._kept[page] = self._handles.pop(page)

    def unmap(self, pages: Iterable[int]) -> None:
        """Unmap `pages`; a failure leaves the page that failed, and those behind it, mapped.

        Raises:
            PageStateError: If a page is not mapped.
            BackendError: If the backend fails.
        """
        for page in pages:
            if page not in self._handles:
                raise PageStateError(f"unmap of page {page}, which is not mapped")
            with _measured(self.unmaps):
                self._detach(page, self._handles[page])
                self._release(self._handles.pop(page))

    def zero(self) -> None:
        """Fill the mapped pages with zeros, on torch's current stream, while no step runs."""
        whole = self.tensor()
        for offset, num_bytes in self._ranges_of(self.resident_pages):
            whole[offset : offset + num_bytes].zero_()

    def tensor(self) -> "torch.Tensor":
        """Return an int8 tensor over the whole reservation."""
        return self.backend.tensor(self.address, self.num_bytes)

    def plane_tensor(self, plane: int, size_class: int = 0) -> "torch.Tensor":  # noqa: ARG002
        """Return an int8 tensor of a class's `plane`: dense, and as long as the id space."""
        num_bytes = self.geometry.num_ids(self.num_pages) * self.geometry.block_bytes
        return self.backend.tensor(self.address + self.geometry.plane_offset(plane), num_bytes)

    def close(self) -> None:
        """Unmap everything and free the addresses. Tensors over them must not be used any more."""
        if self.address:
            self._handles |= self._kept
            self._kept.clear()
            self.unmap(self.resident_pages)
            while self._loose:
                self._release(self._loose.pop())
            self.backend.free(self.address, self.num_bytes)
            self.address = 0

    def _map_page(self, page: int) -> None:
        if page in self._handles:
            raise PageStateError(f"map of page {page}, which is mapped already")
        if not 0 <= page < self.num_pages:
            raise PageStateError(f"map of page {page}, allowed are 0 to {self.num_pages - 1}")
        handle = self._kept.pop(page, None)
        if handle is None:
            with _measured(self.maps):
                handle = self._take_handle()
                try:
                    self._attach(page, handle)
                except BackendError:
                    self._let_go(handle)
                    raise
        self._handles[page] = handle

    def _take_handle(self) -> Handle:
        with contextlib.suppress(IndexError):
            return self._loose.pop()
        return self.backend.create(self.geometry.page_bytes)

    def _release(self, handle: Handle) -> None:
        try:
            self.backend.release(handle)
        except BackendError:
            self._loose.append(handle)
            raise

    def _let_go(self, handle: Handle) -> None:
        """Release memory after a failure, which is what its caller is told of."""
        with contextlib.suppress(BackendError):
            self._release(handle)

    def _attach(self, page: int, handle: Handle) -> None:
        self.backend.map(self.address + page * self.geometry.page_bytes, handle)

    def _detach(self, page: int, handle: Handle) -> None:
        self.backend.unmap(self.address + page * self.geometry.page_bytes, handle)

    def _ranges_of(self, pages: list[int]) -> Iterator[tuple[int, int]]:
        """Yield where mapped pages lie in the reservation, and how many bytes are there."""
        page_bytes = self.geometry.page_bytes
        for first, num_pages in _runs(pages):
            yield first * page_bytes, num_pages * page_bytes


class _measured:  # noqa: N801  it is used as a function; one with `yield` costs three times this
    """Counts a call in `meter`."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def __enter__(self) -> None:
        self._started_ns = time.perf_counter_ns()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._meter.count(time.perf_counter_ns() - self._started_ns)
        else:
            self._meter.count_failure()


def _runs(pages: list[int]) -> Iterator[tuple[int, int]]:
    """Yield the first page and the length of each run of consecutive pages."""
    start = 0
    for index in range(1, len(pages) + 1):
        if index == len(pages) or pages[index] != pages[index - 1] + 1:
            yield pages[start], index - start
            start = index
