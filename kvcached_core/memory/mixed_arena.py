"""An arena of pages that have a handle in each of several size classes."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvcached_core.errors import BackendError
from kvcached_core.memory.arena import Arena
from kvcached_core.memory.geometry import Geometry
from kvcached_core.memory.size_classes import MixedGeometry
from kvcached_core.memory.vmm.backend import Backend, Handle

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Handles:
    """What one page is mapped with: a handle in each size class."""

    parts: tuple[Handle, ...]

    @property
    def num_bytes(self) -> int:
        """Its size in bytes."""
        return sum(part.num_bytes for part in self.parts)


class MixedArena(Arena):
    """An arena in which a page is mapped in all size classes, or in none.

    What fails in the middle is undone. If undoing fails, too, the page is not resident, and what
    is left of it goes when the page is mapped the next time, or with the arena.

    Args:
        backend: Where addresses and memory come from.
        geometry: The size classes.
        num_pages: Pages of the reservation.

    Raises:
        GeometryError: If the block ids would not fit 31 bits.
        BackendError: If the range cannot be reserved.
    """

    geometry: MixedGeometry

    def __init__(self, backend: Backend, geometry: MixedGeometry, num_pages: int) -> None:
        super().__init__(backend, geometry, num_pages)
        self._spans = [
            (geometry.class_offset(index, num_pages), each.page_bytes, handle_bytes)
            for index, (each, handle_bytes) in enumerate(
                zip(geometry.classes, geometry.handle_bytes, strict=True)
            )
        ]
        self._left: dict[int, Handle] = {}  # by address: there only while undoing fails

    def plane_tensor(self, plane: int, size_class: int = 0) -> "torch.Tensor":
        """See `Arena`."""
        geometry = self.geometry.classes[size_class]
        offset = self._spans[size_class][0] + geometry.plane_offset(plane)
        num_bytes = geometry.num_ids(self.num_pages) * geometry.block_bytes
        return self.backend.tensor(self.address + offset, num_bytes)

    def close(self) -> None:
        """See `Arena`."""
        self._clear(list(self._left))
        super().close()

    def _ranges_of(self, pages: list[int]) -> Iterator[tuple[int, int]]:
        for page in pages:
            for offset, span_bytes, handle_bytes in self._spans:
                yield offset + page * span_bytes, handle_bytes

    def _take_handle(self) -> Handle:
        taken: list[Handle] = []
        try:
            for num_bytes in self.geometry.handle_bytes:
                taken.append(self._take_part(num_bytes))  # noqa: PERF401  what is taken goes back
        except BackendError:
            self._let_go(Handles(tuple(taken)))
            raise
        return Handles(tuple(taken))

    def _take_part(self, num_bytes: int) -> Handle:
        for handle in list(self._loose):
            if handle.num_bytes == num_bytes:
                with contextlib.suppress(ValueError):  # another thread was faster
                    self._loose.remove(handle)
                    return handle
        return self.backend.create(num_bytes)

    def _release(self, handle: Handle) -> None:
        failure: BackendError | None = None
        left = list(self._left.values())
        for part in handle.parts if isinstance(handle, Handles) else (handle,):
            try:
                if not any(part is other for other in left):
                    super()._release(part)
            except BackendError as error:
                failure = error
        if failure is not None:
            raise failure

    def _attach(self, page: int, handle: Handle) -> None:
        places = self._places(page, handle)
        self._clear([address for address, _ in places if address in self._left])
        done: list[tuple[int, Handle]] = []
        try:
            for address, part in places:
                self.backend.map(address, part)
                done.append((address, part))
        except BackendError:
            self._undo_attach(done)
            raise

    def _undo_attach(self, done: list[tuple[int, Handle]]) -> None:
        for address, part in reversed(done):
            try:
                self.backend.unmap(address, part)
            except BackendError:
                self._left[address] = part

    def _detach(self, page: int, handle: Handle) -> None:
        places = self._places(page, handle)
        for index, (address, part) in enumerate(places):
            try:
                self.backend.unmap(address, part)
            except BackendError:
                self._undo_detach(page, places, index)
                raise

    def _undo_detach(self, page: int, places: list[tuple[int, Handle]], num_gone: int) -> None:
        num_back = num_gone
        try:
            while num_back:
                self.backend.map(*places[num_back - 1])
                num_back -= 1
        except BackendError:
            self._left.update(places[num_back:])
            self._release(self._handles.pop(page))
            raise

    def _clear(self, addresses: Iterable[int]) -> None:
        """Let go of what was left behind at these addresses."""
        for address in addresses:
            self.backend.unmap(address, self._left[address])
            super()._release(self._left.pop(address))

    def _places(self, page: int, handle: Handle) -> list[tuple[int, Handle]]:
        parts = handle.parts if isinstance(handle, Handles) else ()
        addresses = (self.address + offset for offset, _ in self._ranges_of([page]))
        return list(zip(addresses, parts, strict=True))


def make_arena(backend: Backend, geometry: Geometry, num_pages: int) -> Arena:
    """Return an arena for this geometry, of one size class or of several.

    Raises:
        KVCachedError: As `Arena`.
    """
    if isinstance(geometry, MixedGeometry):
        return MixedArena(backend, geometry, num_pages)
    return Arena(backend, geometry, num_pages)
