"""Mapping and unmapping an arena's pages: in front of a step that needs them, or behind its back.

The engine's thread waits only for what its next step needs. Spare pages are mapped ahead by one
thread; pages given back are unmapped by another one, behind a fence, so that waiting for the device
never holds up a map.

What the device refuses is no end: a spare page that finds no memory is left to the step that needs
it, a page that cannot be unmapped stays. Anything else ends the thread it happens in, and with it
the keeper: every later call raises what it was.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice

from kvcached_core.errors import BackendError, PageKeeperError
from kvcached_core.ledger.forks import disown_in_children
from kvcached_core.memory.arena import Arena
from kvcached_core.memory.joined_arenas import JoinedArenas
from kvcached_core.memory.vmm.backend import Fence

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
        num_stuck: Pages that could not be unmapped and are resident still: nobody shall wait for
            their memory.
    """

    num_mapped: int = 0
    num_unmapped: int = 0
    num_spared: int = 0
    num_stuck: int = 0


class PageKeeper:
    """Brings an arena's pages to where they shall be, now or soon.

    A page has at most one order that is not begun: a new one replaces it. Its methods are for one
    thread, the engine's.

    Args:
        arena: Nobody else may map or unmap its pages.
        report: Told what changed, after the fact, in the thread that changed it.

    Raises:
        PageKeeperError: From each method, when one of the keeper's threads has ended; from one that
            takes orders, when the keeper is closed.
    """

    def __init__(self, arena: Arena | JoinedArenas, report: Callable[[PageChanges], None]) -> None:
        self.arena = arena
        self._report = report
        self._to_map: dict[int, None] = {}
        self._to_unmap: dict[int, Fence] = {}
        self._fences: deque[Fence] = deque()
        self._mapping: list[int] = []
        self._unmapping: list[int] = []
        self._stuck: set[int] = set()  # could not be unmapped, and nobody has wanted them since
        self._changed = threading.Condition()
        self._is_closed = False
        self._error: Exception | None = None
        self._threads = [
            threading.Thread(target=self._run, args=(work,), name=name, daemon=True)
            for name, work in (
                ("kvcached-map", self._map_ahead),
                ("kvcached-unmap", self._unmap_behind),
            )
        ]
        for thread in self._threads:
            thread.start()
        disown_in_children(self)

    def map_now(self, pages: Iterable[int], stream: int = 0) -> None:
        """Return when `pages` are mapped and `stream` may be given work on them.

        Raises:
            BackendError: If one cannot be mapped; then none is that was not resident before.
        """
        wanted = list(pages)
        with self._changed:
            self.check()
            num_kept = sum(self._to_unmap.pop(page, None) is not None for page in wanted)
            for page in wanted:
                self._to_map.pop(page, None)
            while not {*self._mapping, *self._unmapping}.isdisjoint(wanted):
                self._wait()
            num_kept += self._want_stuck(wanted)
        if num_kept:
            self._report(PageChanges(num_spared=num_kept))
        missing = [page for page in wanted if not self.arena.is_resident(page)]
        if missing:
            self.arena.map(missing)
            try:
                self.arena.backend.join(stream)
            except BackendError:
                self.arena.take_back(missing)
                raise
            self._report(PageChanges(num_mapped=len(missing)))

    def map_soon(self, pages: Iterable[int]) -> None:
        """Map `pages` in the background. A failure is left to the step that needs the page."""
        with self._changed:
            self.check()
            num_kept = 0
            for page in pages:
                is_kept = self._to_unmap.pop(page, None) is not None or self._want_stuck([page]) > 0
                num_kept += is_kept
                is_going = page in self._unmapping  # by an earlier order that was begun
                if is_going or not (is_kept and self.arena.is_resident(page)):
                    self._to_map[page] = None
            self._changed.notify_all()
        if num_kept:
            self._report(PageChanges(num_spared=num_kept))

    def unmap_behind(self, pages: Iterable[int], fence: Fence) -> None:
        """Unmap `pages` in the background, when the work in front of `fence` is done."""
        with self._changed:
            self.check()
            for page in pages:
                self._to_map.pop(page, None)
                self._stuck.discard(page)
                self._to_unmap[page] = fence
            self._fences.append(fence)
            self._changed.notify_all()

    def wait(self, seconds: float | None = None) -> None:
        """Return when no order is left, or after so many seconds."""
        with self._changed:
            self._changed.wait_for(self._is_at_rest, seconds)
            self._check_threads()

    def close(self) -> None:
        """Carry out what is left and stop the threads."""
        try:
            self.wait()
        finally:
            with self._changed:
                self._is_closed = True
                self._changed.notify_all()
            for thread in self._threads:
                thread.join()
            self._to_map.clear()  # where the wait was interrupted, nobody carries them out any more
            self._to_unmap.clear()

    def check(self) -> None:
        """Return if both threads are there for what comes."""
        self._check_threads()
        if self._is_closed:
            raise PageKeeperError("pages are no longer mapped and unmapped: the keeper is closed")

    def disown(self) -> None:
        """Refuse every call in a forked child, which has none of the threads; see `forks`."""
        self._changed = threading.Condition()  # one of them may have had it
        self._error = RuntimeError("a forked child owns nothing")

    def _check_threads(self) -> None:
        if self._error is not None:
            raise PageKeeperError(
                f"pages can no longer be mapped and unmapped, this engine has to be started again: "
                f"{type(self._error).__name__}: {self._error}"
            ) from self._error

    def _is_at_rest(self) -> bool:
        has_orders = self._to_map or self._to_unmap or self._mapping or self._unmapping
        return self._error is not None or not has_orders

    def _wait(self) -> None:
        self._changed.wait()
        self._check_threads()

    def _want_stuck(self, pages: list[int]) -> int:
        """Return how many of `pages` were promised to no purpose: they are resident still."""
        num_before = len(self._stuck)
        self._stuck.difference_update(pages)
        return num_before - len(self._stuck)

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            with self._changed:
                if self._error is None:
                    logger.exception("kvcached: a thread that maps and unmaps pages has ended")
                    self._error = error
                self._changed.notify_all()

    def _map_ahead(self) -> None:
        while True:
            with self._changed:
                self._mapping = []
                self._changed.notify_all()
                while not (batch := self._ready_to_map()) and not self._is_closed:
                    self._wait()
                if self._is_closed:
                    return
                self._mapping = batch
                for page in batch:
                    del self._to_map[page]
            self._map(batch)

    def _unmap_behind(self) -> None:
        while True:
            with self._changed:
                while not self._fences and not self._is_closed:
                    self._wait()
                if self._is_closed:
                    return
                fence = self._fences.popleft()
            fence.wait()  # until it returns its pages can still be kept; if it fails nothing goes
            while batch := self._take_behind(fence):
                self._unmap(batch)

    def _ready_to_map(self) -> list[int]:
        pages = (page for page in self._to_map if page not in self._unmapping)
        return list(islice(pages, BATCH_PAGES))

    def _take_behind(self, fence: Fence) -> list[int]:
        with self._changed:
            while True:
                self._unmapping = []
                self._changed.notify_all()
                behind = (page for page, found in self._to_unmap.items() if found is fence)
                batch = list(islice(behind, UNMAP_BATCH_PAGES))
                if set(batch).isdisjoint(self._mapping):
                    break
                self._wait()
            self._unmapping = batch
            for page in batch:
                del self._to_unmap[page]
            return batch

    def _map(self, pages: list[int]) -> None:
        with self._changed:
            num_kept = self._want_stuck(pages)
        missing = [page for page in pages if not self.arena.is_resident(page)]
        try:
            self.arena.map(missing)
        except BackendError as error:
            logger.warning("kvcached: spare pages were not mapped ahead: %s", error)
            missing = []
        else:
            self.arena.backend.synchronize()  # who finds them resident may read them at once
        if missing or num_kept:
            self._report(PageChanges(num_mapped=len(missing), num_spared=num_kept))

    def _unmap(self, pages: list[int]) -> None:
        resident = [page for page in pages if self.arena.is_resident(page)]
        for page in resident:
            try:
                self.arena.unmap([page])
            except BackendError:
                logger.exception("kvcached: page %d could not be given back", page)
        stuck = [page for page in resident if self.arena.is_resident(page)]
        with self._changed:
            self._stuck.update(stuck)
        self._report(
            PageChanges(
                num_unmapped=len(resident) - len(stuck),
                num_spared=len(pages) - len(resident),
                num_stuck=len(stuck),
            )
        )
