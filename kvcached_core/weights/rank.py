"""The weights of one rank: given from the end of the image, and brought back from the host's copy.

A page that is what its copy is, is dropped; one that has changed is written back before. All pages
in front of the first that is missing are there, so who schedules knows the state by one number.
"""

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from kvcached_core.errors import BackendError, HostCopyError, LedgerError, OutOfMemoryError
from kvcached_core.ledger.bell import wake
from kvcached_core.ledger.expected import START_SECONDS
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.shortage import ask_peers
from kvcached_core.ledger.times import NO_CALLS
from kvcached_core.memory.patience import keep_trying
from kvcached_core.memory.seats import Seat
from kvcached_core.memory.torch_device import release_cached_blocks
from kvcached_core.units import MIB
from kvcached_core.weights.copying import Copying
from kvcached_core.weights.host_copy import HostCopy
from kvcached_core.weights.image import Image
from kvcached_core.weights.status import WeightStatus
from kvcached_core.weights.sums import Sums

logger = logging.getLogger("kvcached")

# Pages that are given first: whoever asked has them while the others still go. A further batch is
# twice as large: each is told to the ledger, and waits for the device once.
DROP_BATCH_PAGES, MAX_DROP_BATCH_PAGES = 8, 64
# Pages that are brought at a time before the ledger is told.
MAP_BATCH_PAGES = 4
# Bytes that are copied at a time: the few that a neighbour's step copies to the same device get in
# between. Smaller ones make a wake longer.
MAX_COPY_BYTES = 16 * MIB
# How long a wake waits for memory that was promised; the engine goes on asking afterwards.
PATIENCE_SECONDS = 2.0


class RankWeights:
    """An image, its copy on the host, and their part of the ledger.

    Its methods are for the worker's thread, between two steps.

    Attributes:
        copying: The copy on the host, and what makes it.

    Args:
        image: The image; what of it is resident is there, all of it as a rule.
        make_copy: Returns the host copy, complete or to be filled, or None if there is no room for
            one now. It is called in a thread of its own, again and again while there is none, and
            returns soon after its argument is set.
        current_stream: Returns the stream that the engine's steps are launched on.
    """

    def __init__(
        self,
        image: Image,
        make_copy: Callable[[threading.Event], HostCopy | None],
        current_stream: Callable[[], int] = lambda: 0,
    ) -> None:
        self.image = image
        self._pid = os.getpid()
        self.copying = Copying(image, make_copy, self._expect)
        self._current_stream = current_stream
        self._dirty: set[int] = set()
        # A page whose content could not be brought is resident, and not there.
        self._num_there = image.num_resident_pages
        self._ledger: Ledger | None = None
        self._seat: Seat | None = None
        self._num_reported = 0

    def status(self) -> WeightStatus:
        """Return how much is there, and whether more may be dropped. Any thread may call it."""
        is_copied = self.copying.copy is not None
        image = self.image
        return WeightStatus(image.num_pages, self._num_there, image.page_bytes, is_copied)

    def join(self, seat: Seat) -> None:
        """From now on, tell the ledger of the rank's device what is resident.

        Raises:
            LedgerError: If the ledger cannot be used.
        """
        with contextlib.ExitStack() as undo:
            ledger = Ledger(Path(seat.ledger_path))
            undo.callback(ledger.close)
            ledger.join(seat.row)
            undo.pop_all()
        self._ledger, self._seat = ledger, seat
        self._report()
        self._expect(START_SECONDS)

    def begin_copy(self) -> None:
        """Begin to have a copy on the host, behind the engine's back; `status` says when it is.

        Call it when the engine is ready: what it captures as a graph must not meet another thread's
        copies.
        """
        self.copying.begin()

    def mark_dirty(self) -> None:
        """Take every page for changed, because somebody has written weights on purpose."""
        self._dirty.update(range(self.image.num_pages))

    def hold(self, num_pages: int) -> WeightStatus:
        """Have exactly the first `num_pages` there, or all if there are not so many.

        Pages go when all work of the engine's stream is done. Work that is launched on it after
        this has returned finds the pages that came; the host does not wait for them. Nothing is
        dropped that cannot be brought back: without a copy, or without room for what has changed,
        pages stay.

        Returns:
            What is there then: less than was wanted if others took the memory for it.

        Raises:
            BackendError: If the backend fails; the pages in front of that are there.
            LedgerError: If the instance has left the ledger.
        """
        wanted = min(num_pages, self.image.num_pages)
        try:
            self._drop_unfinished()
            copy = self.copying.copy
            if copy is None or wanted == self._num_there:
                return self.status()
            if wanted > self._num_there:
                self._bring(copy, wanted)
            else:
                self._give(copy, wanted)
        except OutOfMemoryError as error:
            # Others than engines took it. What came stays, and the rest is asked for again.
            logger.warning("kvcached: %s; requests wait for the rest of the weights", error)
        finally:
            self._report()
        return self.status()

    def close(self) -> None:
        """Give everything back; in a forked child, which owns nothing, do nothing.

        No tensor over the image may be used any more.
        """
        if os.getpid() != self._pid:
            return
        self.copying.stop()
        copy, self.copying.copy = self.copying.copy, None
        with contextlib.ExitStack() as rest:
            if self._ledger is not None:
                rest.callback(self._ledger.close)
            rest.callback(self._report_end)
            rest.callback(self.image.close)
            if copy is not None:
                rest.callback(copy.close)
            with contextlib.suppress(BackendError):  # a device that failed has nothing to wait for
                self._wait_for_device()
        self._num_there = 0

    def _give(self, copy: HostCopy, num_pages: int) -> None:
        self._wait_for_device()
        source = self.copying.source
        batches = list(_batches(self._num_there, num_pages))
        look = source.begin_sums(*batches[0])
        for (first, _), following in zip(batches, [*batches[1:], None], strict=True):
            try:
                is_clean = self._write_back(copy, first, look())
            except HostCopyError as error:
                logger.warning("kvcached: changed weights stay on the device: %s", error)
                return
            if not is_clean:
                logger.warning("kvcached: weights change though nothing runs, so they stay")
                return
            if following is not None:  # the device looks while the host drops
                look = source.begin_sums(*following)
            self._num_there = first
            self._drop_unfinished()
            if following is None:
                # Whom the last report wakes may need this memory too, and nobody rings for it.
                release_cached_blocks()
            self._report()

    def _write_back(self, copy: HostCopy, first: int, sums: Sequence[Sums]) -> bool:
        """Have the copy know what the pages of these sums are; return whether it does."""
        changed = [
            page
            for page, found in enumerate(sums, first)
            if page in self._dirty or found != copy.sums[page]
        ]
        if changed and not copy.write_back(changed, self.copying.source):
            return False
        self._dirty.difference_update(changed)
        return True

    def _bring(self, copy: HostCopy, num_pages: int) -> None:
        image = self.image
        try:
            while self._num_there < num_pages:
                batch_end = min(self._num_there + MAP_BATCH_PAGES, num_pages)
                while (page := self._num_there) < batch_end:
                    self._map_next((num_pages - page) * image.page_bytes)
                    self._copy_in(copy, page)
                    self._num_there += 1
                self._report()
        finally:
            image.backend.join_copies(self._current_stream())

    def _copy_in(self, copy: HostCopy, page: int) -> None:
        image = self.image
        address, host_address = image.page_address(page), copy.page_address(page)
        for begin in range(0, image.page_bytes, MAX_COPY_BYTES):
            num_bytes = min(MAX_COPY_BYTES, image.page_bytes - begin)
            image.backend.copy_in(address + begin, host_address + begin, num_bytes)

    def _map_next(self, missing_bytes: int) -> None:
        ledger, seat = self._ledger, self._seat
        if ledger is None or seat is None:
            self.image.map_next(1)
            return
        has_asked = False

        def ask() -> None:
            nonlocal has_asked
            has_asked = True
            self._report()
            ask_peers(ledger, seat.row, missing_bytes, is_static=True)

        try:
            keep_trying(lambda: self.image.map_next(1), ask, PATIENCE_SECONDS)
        finally:
            if has_asked:
                ledger.clear_waiting(seat.row)

    def _drop_unfinished(self) -> None:
        """Drop resident pages that do not count as there."""
        surplus = self.image.num_resident_pages - self._num_there
        if surplus:
            self.image.drop_last(surplus)

    def _wait_for_device(self) -> None:
        """Return when nothing reads or writes a page any more."""
        self.image.backend.fence(self._current_stream()).wait()
        self.image.backend.finish_copies()

    def _report(self) -> None:
        """Tell the ledger what became of pages since it was told last; wake who waits for them."""
        if self._ledger is None or self._seat is None:
            return
        more = self.image.num_resident_pages - self._num_reported
        arena = self.image.arena
        map_times, unmap_times = arena.maps.take(), arena.unmaps.take()
        if not more and map_times is unmap_times is NO_CALLS:
            return
        self._num_reported += more
        more_bytes = more * self.image.page_bytes
        waiting = self._ledger.settle_weights(
            self._seat.row,
            mapped_bytes=max(more_bytes, 0),
            unmapped_bytes=max(-more_bytes, 0),
            map_times=map_times,
            unmap_times=unmap_times,
        )
        wake(self._ledger, waiting)

    def _expect(self, seconds: float) -> None:
        """Say in how many seconds there is news of weights that are not offered yet."""
        if self._ledger is not None and self._seat is not None:
            with contextlib.suppress(LedgerError):  # the engine may have left
                self._ledger.expect_weights(self._seat.row, seconds)

    def _report_end(self) -> None:
        with contextlib.suppress(LedgerError):  # the engine may have left, and with it the row
            self._report()


def _batches(num_there: int, num_pages: int) -> Iterator[tuple[int, int]]:
    """Yield the first page of each batch that goes, and how many they are."""
    batch_pages = DROP_BATCH_PAGES
    while num_there > num_pages:
        first = max(num_there - batch_pages, num_pages)
        yield first, num_there - first
        num_there = first
        batch_pages = min(2 * batch_pages, MAX_DROP_BATCH_PAGES)
