"""A clock that stands still until it is set, for a program that begins anew with it as its own.

Modules keep functions of `time` when they are imported. So in such a program the clock has to be
there before all others, and in any other one this module leaves the time alone.
"""

import os
import sys
import time

EPOCH_NS = 1_700_000_000_000_000_000
RULES = "VIRTUAL_TIME"  # a variable that says which kind of program this is


class Clock:
    """The time of everything in a program that has begun with it.

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


def begin() -> None:
    """Begin this program anew in virtual time; return if it has."""
    if RULES not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {RULES: "1"})  # noqa: S606  itself


clock = Clock()
if RULES in os.environ:
    time.monotonic, time.monotonic_ns = clock.monotonic, clock.monotonic_ns
    time.time_ns = clock.time_ns
