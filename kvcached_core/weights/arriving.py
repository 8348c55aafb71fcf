"""Weights on their way: which pages are there behind which copy, and who has waited for them.

A device carries copies out in the order in which it was told of them. So it is told of what
somebody waits for, and of a few pages ahead: what others hand to it is not behind all weights.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable

from kvcached_core.errors import BackendError
from kvcached_core.memory.vmm.backend import Backend, Mark
from kvcached_core.units import MIB

# What the device is told of ahead of what it has copied, unless somebody waits for more: enough for
# the time from a wake to the first layers of the step that it is for, at the speed of a fast link.
AHEAD_BYTES = 512 * MIB


class Arriving:
    """The pages of an image that no step has found there yet, the last of which may not have begun.

    The pages in front of them are there. One thread at a time uses it.

    Attributes:
        is_pending: Whether there are any: all that a step looks at while everything is there.
        on_lost: Told how many pages there are of all, where the copies of others cannot be begun.
        on_finished: Called when `finish` has found everything there, or had it waited for.

    Args:
        backend: What copies them.
        current_stream: Returns the stream that work on them is launched on now.
        page_bytes: The size of one.
    """

    def __init__(
        self, backend: Backend, current_stream: Callable[[], int], page_bytes: int = AHEAD_BYTES
    ) -> None:
        self.is_pending = False
        self.on_lost: Callable[[int], None] = lambda _num_pages: None
        self.on_finished: Callable[[], None] = lambda: None
        self._backend = backend
        self._current_stream = current_stream
        self._page_bytes = page_bytes
        self._begin: Callable[[int], None] = lambda _page: None
        self._num_there = self._num_begun = self._num_expected = self._num_done = 0
        self._ends: list[int] = []
        self._marks: list[Mark] = []
        self._num_waited: dict[int, int] = {}  # marks that each stream has waited for

    @property
    def num_unbegun(self) -> int:
        """Of how many pages the copies have not begun; any thread may ask."""
        num_begun = self._num_begun  # first: both numbers grow, and too many do no harm
        return self._num_expected - num_begun

    def expect(self, page: int, begin: Callable[[int], None]) -> None:
        """Have a page come, behind all that were expected before: now, or when a step comes near.

        Args:
            page: It is mapped, and so are all in front of it.
            begin: Begins to copy a page; it is called for each one, in their order.

        Raises:
            BackendError: If the backend fails. Pages that have not begun are lost, and no others.
        """
        self._num_expected = page + 1  # before what has begun: see `num_unbegun`
        if not self.is_pending:
            self._num_there = self._num_begun = self._num_done = page
        self._begin, self.is_pending = begin, True
        self._begin_ahead()

    def begin_rest(self) -> None:
        """Begin the copies of all pages that are expected.

        Raises:
            BackendError: As `expect`.
        """
        self._begin_until(self._num_expected)

    def wait(self, num_pages: int) -> None:
        """Make later work on the current stream wait for the first pages; the host does not wait.

        If the driver refuses that, the host waits until all is there.

        Raises:
            BackendError: If that fails, too, or the copies cannot be begun: the device is of no use
                any more.
        """
        if self.is_pending:
            self._begin_until(num_pages)
            self._join(num_pages)
            self._begin_ahead()

    def finish(self) -> None:
        """Make later work on the current stream wait for all pages; then nothing is pending.

        Raises:
            BackendError: As `wait`.
        """
        if self.is_pending:
            self.wait(self._num_expected)
            self.forget()
            self.on_finished()

    def forget(self) -> None:
        """Take all pages for there: who calls it has waited, or needs none of them."""
        self.is_pending = False
        self._num_expected = self._num_begun
        marks, self._marks = self._marks, []
        self._ends.clear()
        self._num_waited.clear()
        for mark in marks:
            mark.close()

    def _join(self, num_pages: int) -> None:
        if not self._marks or num_pages <= self._num_there:
            return
        stream = self._current_stream()
        number = min(bisect_left(self._ends, num_pages), len(self._marks) - 1)
        if number < self._num_waited.get(stream, 0):
            return
        try:
            self._marks[number].join(stream)
        except BackendError:
            self._backend.finish_copies()
        self._num_waited[stream] = number + 1

    def _begin_ahead(self) -> None:
        """Begin so many copies that the device has enough to do."""
        ahead_pages = max(AHEAD_BYTES // self._page_bytes, 1)
        while self._num_begun < min(self._num_expected, self._look_done() + ahead_pages):
            self._begin_until(self._num_begun + 1)

    def _look_done(self) -> int:
        """Return how many pages are known to be copied, or were there."""
        number = bisect_right(self._ends, self._num_done)
        while number < len(self._marks) and self._marks[number].is_done():
            self._num_done = self._ends[number]
            number += 1
        return self._num_done

    def _begin_until(self, num_pages: int) -> None:
        """Begin the copies of the first pages, as far as they are expected, and mark each."""
        while self._num_begun < min(self._num_expected, num_pages):
            try:
                self._begin(self._num_begun)
            except BackendError:
                self._num_expected = self._num_begun
                self.on_lost(self._num_begun)
                raise
            self._num_begun += 1
            self._mark()

    def _mark(self) -> None:
        """Mark the copies that have begun; if the driver refuses that, wait until they are done."""
        try:
            mark = self._backend.mark_copies()
        except BackendError:
            self._backend.finish_copies()
            self._num_there = self._num_done = self._num_begun
        else:
            self._ends.append(self._num_begun)
            self._marks.append(mark)
