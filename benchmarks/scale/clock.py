"""Simulated time: what happens when."""

import heapq
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count

from scale.tally import Tally


class Clock:
    """Events by their time.

    Attributes:
        now: The simulated time, in seconds from midnight.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._order = count()
        self._events: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []

    def after(self, seconds: float, act: Callable[..., None], *values: object) -> None:
        """Let something happen later."""
        heapq.heappush(self._events, (self.now + seconds, next(self._order), act, values))

    @property
    def next_at(self) -> float:
        """When the next event is."""
        return self._events[0][0] if self._events else float("inf")

    def step(self) -> None:
        """Let the next event happen."""
        self.now, _, act, values = heapq.heappop(self._events)
        act(*values)


@contextmanager
def deciding(kind: str, tally: Tally) -> Iterator[None]:
    """Note what the decision inside takes of the processor."""
    begun = time.thread_time_ns()
    yield
    tally.decided(kind, (time.thread_time_ns() - begun) / 1e6)
