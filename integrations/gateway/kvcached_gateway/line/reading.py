"""Prompts that engines read right now: dispatched, and without a first byte.

What is in an engine's own queue cannot be put in another order. So where goals are set, an engine
gets no more than it needs to stay busy, and the rest waits in the line.
"""

from collections.abc import Callable
from dataclasses import dataclass

from kvcached_gateway.lease import Ending, Lease, WrappedLease
from kvcached_gateway.policy.admission import Prompt, has_room


@dataclass(eq=False)
class Reading:
    """One prompt that an engine reads.

    Attributes:
        prompt: What of it counts for others.
        is_alone: Whether no other prompt was read beside it.
    """

    prompt: Prompt
    is_alone: bool


class Readings:
    """The prompts that engines on one set of devices read."""

    def __init__(self) -> None:
        self._open: dict[Reading, None] = {}

    def begin(self, prompt: Prompt) -> Reading:
        """Let an engine read one more."""
        for other in self._open:
            other.is_alone = False
        reading = Reading(prompt, is_alone=not self._open)
        self._open[reading] = None
        return reading

    def end(self, reading: Reading) -> bool:
        """Say that it is read, or will not be; return whether that is news."""
        return self._open.pop(reading, reading) is None

    def has_room(self, model_id: str, now: float) -> bool:
        """Whether a model's engine should get one more."""
        return has_room(model_id, (reading.prompt for reading in self._open), now)

    def next_stall_at(self, now: float) -> float | None:
        """Return when the next prompt stops to count for other models, if any does."""
        stalls = (reading.prompt.stalls_at for reading in self._open)
        return min((at for at in stalls if at > now), default=None)


class ReadingLease(WrappedLease):
    """A model's lease that says when its prompt is read.

    Args:
        inner: The model's own.
        on_read: Called once: with True at the first byte, with False if it ends without one.
    """

    def __init__(self, inner: Lease, on_read: Callable[[bool], None]) -> None:
        super().__init__(inner)
        self._on_read = on_read

    def first_byte(self) -> bool:
        """See `Lease.first_byte`."""
        may_pass = super().first_byte()
        if may_pass:
            self._on_read(True)  # noqa: FBT003  the one thing that it says
        return may_pass

    def end(self, ending: Ending, *, status: int = 0) -> None:
        """See `Lease.end`."""
        super().end(ending, status=status)
        self._on_read(False)  # noqa: FBT003  the same
