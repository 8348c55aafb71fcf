"""Forwards over weights of which the last are still on their way: each part waits for its own."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from kvcached_core.errors import LayerOrderError
from kvcached_core.weights.arriving import Arriving
from kvcached_core.weights.stages import Points

logger = logging.getLogger("kvcached")


class Walk:
    """One forward, which passes its points one behind the other.

    Args:
        arriving: The pages on their way.
        points: What it waits for.
    """

    def __init__(self, arriving: Arriving, points: Points) -> None:
        self._arriving = arriving
        self._points = points.num_pages
        self._num_first_pages = points.num_first_pages
        self._num_passed = 0
        self._has_begun = False
        self._is_in_order = True

    @property
    def is_complete(self) -> bool:
        """Whether it has passed all points in their order."""
        return self._is_in_order and self._num_passed == len(self._points)

    def begin(self) -> None:
        """Have what follows wait for the first pages; it may be called again.

        What a step copies to the device for its forward has to come before: a copy behind a wait
        is put off until the device has no others to do.

        Raises:
            BackendError: If the device is of no use any more.
        """
        if not self._has_begun:
            self._has_begun = True
            self._arriving.wait(self._num_first_pages)

    def pass_point(self, number: int) -> None:
        """Have what follows a point wait for the pages that it needs; a point may come again.

        Raises:
            BackendError: If the device is of no use any more.
        """
        if number > self._num_passed or not self._has_begun:
            self._is_in_order = False
        elif number == self._num_passed:
            self._num_passed += 1
            self._arriving.wait(self._points[number])


class Walks:
    """What the steps of a worker do while weights arrive.

    An engine's forward is trusted to pass all points in order once one was seen to do so while all
    weights were there. Until then, and for good if it did not, a step waits for all of them.

    Args:
        arriving: The pages on their way.
        points: What a forward waits for, and where.
    """

    def __init__(self, arriving: Arriving, points: Points) -> None:
        self._arriving = arriving
        self._points = points
        self._is_trusted: bool | None = None  # None: no forward was watched yet

    @property
    def is_due(self) -> bool:
        """Whether the next step has to come here."""
        return self._arriving.is_pending or self._is_trusted is None

    @contextmanager
    def step(self, *, is_whole: bool) -> Iterator[Walk | None]:
        """Launch a step in the block.

        Args:
            is_whole: Whether it runs the model's layers in a way that passes the points: not as a
                graph that was captured, for example.

        Yields:
            The walk that the block has to begin in front of the first use of weights, and to tell
            of each point; None if it runs as usual.

        Raises:
            LayerOrderError: If a forward that was trusted did not pass all points in their order.
                What it computed may be wrong.
            BackendError: If the device is of no use any more.
        """
        was_trusted = self._is_trusted
        if not (was_trusted and is_whole):
            self._arriving.finish()
        if not is_whole or was_trusted is False:
            yield None
            return
        walk = Walk(self._arriving, self._points)
        try:
            yield walk
        finally:
            self._arriving.finish()
        self._is_trusted = walk.is_complete
        if walk.is_complete:
            return
        if was_trusted:
            raise LayerOrderError(
                "a forward did not run the model's layers in their order while weights came, so "
                "its answer is thrown away; unset KVCACHED_WEIGHTS_WAIT"
            )
        logger.warning(
            "kvcached: steps wait for all weights, as with KVCACHED_WEIGHTS_WAIT=all: a forward "
            "does not run this model's layers one behind the other"
        )
