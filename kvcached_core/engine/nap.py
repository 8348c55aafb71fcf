"""The sleep of a loop that looks by itself, while it has nothing to do, and what ends it."""

import os
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvcached_core.engine.pages import Pages


class Nap:
    """A descriptor that a loop polls beside its own: who rings ends its sleep, or the next one.

    Attributes:
        descriptor: It can be read from a ring to the next `end`; whoever may ring keeps it open.
    """

    def __init__(self) -> None:
        self.descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        weakref.finalize(self, os.close, self.descriptor).atexit = False

    def ring(self) -> None:
        """End the sleep; from any thread."""
        os.eventfd_write(self.descriptor, 1)

    def end(self) -> None:
        """Forget the rings so far: it comes before the loop looks what they were for."""
        with suppress(BlockingIOError):
            os.eventfd_read(self.descriptor)


def seconds_until_due(pools: "Sequence[Pages]", weights_seconds: float | None) -> float | None:
    """Return in how many seconds an idle engine has something to do; None if it has nothing.

    While pages are held, whoever hears of the end of a copy looks.

    Args:
        pools: Its pools, of which surplus pages go in time.
        weights_seconds: When its weights are due.
    """
    due = [pages.seconds_until_due() for pages in pools if not pages.book.holds]
    due_seconds = max((seconds for seconds in due if seconds is not None), default=None)
    seconds = [each for each in (due_seconds, weights_seconds) if each is not None]
    return min(seconds, default=None)
