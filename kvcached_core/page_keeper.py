"""Mapping and unmapping an arena's pages: in front of a step that needs them, or behind its back.

The engine's thread waits only for what its next step needs. Spare pages are mapped ahead by one
thread; pages given back are unmapped by another one, behind a fence, so that waiting for the device
never holds up a map.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice

from kvcached_core.arena import Arena
from kvcached_core.errors import KVCachedError
from kvcached_core.vmm.backend import Fence

logger = logging.getLogger("kvcached")

# Pages that are mapped ahead at a time; a step that needs one of them waits for all of these.
BATCH_PAGES = 4

# Pages that are unmapped at a time; a step waits for them only if it wants one of them back.
UNMAP_BATCH_PAGES = 16


@dataclass(frozen=True)
class PageChanges:
    """What became of some orders.

    Attributes:
        num_mapped: Pages that are resident now and were not.
        num_unmapped: Pages that were resident and are not any more.
        num_spared: Orders to map that needed no memory: the page was resident still, or the order
            was taken back before it was begun. Their promises go back.
    """

    num_mapped: int = 0
    num_unmapped: int = 0
    num_spared: int = 0


class PageKeeper:
    """Brings an arena's pages to where they shall be, now or soon.

    A page has at most one order that is not begun: a new one replaces it.

    Args:
        arena: Nobody else may map or unmap its pages.
        report: Told what changed, after the fact, in the thread that changed it.
    """

    def __init__(self, arena: Arena, report: Callable[[PageChanges], None]) -> None:
        self.arena = arena
        self._report = report
        self._to_map: dict[int, None] = {}
        self._to_unmap: dict[int, Fence] = {}
        self._fences: deque[Fence] = deque()
        self._mapping: list[int] = []
        self._unmapping: list[int] = []
        self._changed = threading.Condition()
        self._is_closed = False
        self._threads = [
            threading.Thread(target=self._map_ahead, name="kvcached-map", daemon=True),
            threading.Thread(target=self._unmap_behind, name="kvcached-unmap", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def map_now(self, pages: Iterable[int], stream: int = 0) -> None:
        """Return when `pages` are mapped and `stream` may be given work on them.

        Raises:
            BackendError: If one cannot be mapped; then none is that was not resident before.
        """
        wanted = list(pages)
        with self._changed:
            num_kept = sum(self._to_unmap.pop(page, None) is not None for page in wanted)
            for page in wanted:
                self._to_map.pop(page, None)
            while not {*self._mapping, *self._unmapping}.isdisjoint(wanted):
                self._changed.wait()
        if num_kept:
            self._report(PageChanges(num_spared=num_kept))
        missing = [page for page in wanted if not self.arena.is_resident(page)]
        if missing:
            self.arena.map(missing)
            self.arena.backend.join(stream)
            self._report(PageChanges(num_mapped=len(missing)))

    def map_soon(self, pages: Iterable[int]) -> None:
        """Map `pages` in the background. A failure is left to the step that needs the page."""
        with self._changed:
            num_kept = 0
            for page in pages:
                is_kept = self._to_unmap.pop(page, None) is not None
                num_kept += is_kept
                if not (is_kept and self.arena.is_resident(page)):
                    self._to_map[page] = None
            self._changed.notify_all()
        if num_kept:
            self._report(PageChanges(num_spared=num_kept))

    def unmap_behind(self, pages: Iterable[int], fence: Fence) -> None:
        """Unmap `pages` in the background, when the work in front of `fence` is done."""
        with self._changed:
            for page in pages:
                self._to_map.pop(page, None)
                self._to_unmap[page] = fence
            self._fences.append(fence)
            self._changed.notify_all()

    def wait(self) -> None:
        """Return when no order is left."""
        with self._changed:
            while self._to_map or self._to_unmap or self._mapping or self._unmapping:
                self._changed.wait()

    def close(self) -> None:
        """Carry out what is left and stop the threads."""
        self.wait()
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _map_ahead(self) -> None:
        while True:
            with self._changed:
                self._mapping = []
                self._changed.notify_all()
                while not (batch := self._ready_to_map()) and not self._is_closed:
                    self._changed.wait()
                if self._is_closed:
                    return
                self._mapping = batch
                for page in batch:
                    del self._to_map[page]
            self._carry_out(self._map, self._mapping)

    def _unmap_behind(self) -> None:
        while True:
            with self._changed:
                while not self._fences and not self._is_closed:
                    self._changed.wait()
                if self._is_closed:
                    return
                fence = self._fences.popleft()
            self._carry_out(fence.wait)  # until it returns its pages can still be kept
            while self._take_behind(fence):
                self._carry_out(self._unmap, self._unmapping)

    def _ready_to_map(self) -> list[int]:
        pages = (page for page in self._to_map if page not in self._unmapping)
        return list(islice(pages, BATCH_PAGES))

    def _take_behind(self, fence: Fence) -> bool:
        with self._changed:
            self._unmapping = []
            self._changed.notify_all()
            behind = (page for page, found in self._to_unmap.items() if found is fence)
            batch = list(islice(behind, UNMAP_BATCH_PAGES))
            while not set(batch).isdisjoint(self._mapping):
                self._changed.wait()
            self._unmapping = [page for page in batch if self._to_unmap.get(page) is fence]
            for page in self._unmapping:
                del self._to_unmap[page]
            return bool(batch)

    def _carry_out(self, action: Callable[..., None], *args: list[int]) -> None:
        try:
            action(*args)
        except KVCachedError:
            logger.exception("pages could not be brought to where they shall be")

    def _map(self, pages: list[int]) -> None:
        missing = [page for page in pages if not self.arena.is_resident(page)]
        self.arena.map(missing)
        self.arena.backend.synchronize()
        self._report(PageChanges(num_mapped=len(missing)))

    def _unmap(self, pages: list[int]) -> None:
        resident = [page for page in pages if self.arena.is_resident(page)]
        for page in resident:
            self._carry_out(self.arena.unmap, [page])
        gone = sum(not self.arena.is_resident(page) for page in resident)
        self._report(PageChanges(num_unmapped=gone, num_spared=len(pages) - len(resident)))
