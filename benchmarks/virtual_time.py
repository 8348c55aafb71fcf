"""A clock that stands still until it is set: whatever is imported behind this module reads it."""

import time

EPOCH_NS = 1_700_000_000_000_000_000


class Clock:
    """The time of everything in this process.

    Attributes:
        seconds: The time now.
    """

    def __init__(self) -> None:
        self.seconds = 1000.0

    def monotonic(self) -> float:
        """Stand for `time.monotonic`."""
        return self.seconds

    def monotonic_ns(self) -> int:
        """Stand for `time.monotonic_ns`."""
        return int(self.seconds * 1e9)

    def time_ns(self) -> int:
        """Stand for `time.time_ns`."""
        return EPOCH_NS + self.monotonic_ns()


clock = Clock()
time.monotonic, time.monotonic_ns, time.time_ns = clock.monotonic, clock.monotonic_ns, clock.time_ns
