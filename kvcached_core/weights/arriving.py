"""Weights on their way: which pages are there behind which copy, and who has waited for them."""

from bisect import bisect_left
from collections.abc import Callable

from kvcached_core.errors import BackendError
from kvcached_core.memory.vmm.backend import Backend, Mark


class Arriving:
    """The pages of an image whose copies have begun and that no step has found there yet.

    The pages in front of them are there. One thread at a time uses it.

    Attributes:
        is_pending: Whether there are any: all that a step looks at while everything is there.

    Args:
        backend: What copies them.
        current_stream: Returns the stream that work on them is launched on now.
    """

    def __init__(self, backend: Backend, current_stream: Callable[[], int]) -> None:
        self.is_pending = False
        self._backend = backend
        self._current_stream = current_stream
        self._num_there = 0
        self._ends: list[int] = []
        self._marks: list[Mark] = []
        self._num_waited: dict[int, int] = {}  # marks that each stream has waited for

    def add(self, num_there: int, num_pages: int) -> None:
        """Mark the copies that have begun: who waits for them has the first `num_pages`.

        Args:
            num_there: How many pages nobody has to wait for, if nothing is pending.
            num_pages: More than at the last call.

        Raises:
            BackendError: If the backend fails; nothing is marked then.
        """
        mark = self._backend.mark_copies()
        if not self._marks:
            self._num_there = num_there
        self._ends.append(num_pages)
        self._marks.append(mark)
        self.is_pending = True

    def wait(self, num_pages: int) -> None:
        """Make later work on the current stream wait for the first pages; the host does not wait.

        If the driver refuses that, the host waits until all is there.

        Raises:
            BackendError: If that fails, too: the device is of no use any more.
        """
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

    def finish(self) -> None:
        """Make later work on the current stream wait for all pages; then nothing is pending.

        Raises:
            BackendError: As `wait`.
        """
        if self._marks:
            self.wait(self._ends[-1])
            self.forget()

    def forget(self) -> None:
        """Take all pages for there: who calls it has waited."""
        self.is_pending = False
        marks, self._marks = self._marks, []
        self._ends.clear()
        self._num_waited.clear()
        for mark in marks:
            mark.close()
