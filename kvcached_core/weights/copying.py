"""Having a copy of a rank's weights in host memory, behind the back of its engine."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

from kvcached_core.ledger.expected import COPY_SECONDS
from kvcached_core.units import format_bytes
from kvcached_core.weights.host_copy import HostCopy, complete
from kvcached_core.weights.image import Image
from kvcached_core.weights.source import CopySource

logger = logging.getLogger("kvcached")

# When it is tried again to copy the weights, where it failed or host memory had no room for all of
# them; each time twice as long.
FIRST_RETRY_SECONDS = 5.0
LAST_RETRY_SECONDS = 600.0
# How often it is said that a copy gets further.
NEWS_SECONDS = 1.0


class Copying:
    """The host copy of an image, and the thread that completes it.

    Attributes:
        copy: The copy, once it is complete.
        source: What it is taken of.
        on_copied: Called in the thread when the copy is there.

    Args:
        image: Of which all pages are resident until the copy is complete.
        make_copy: Returns the host copy, complete or to be filled, or None if there is no room for
            one now. It is called in the thread, again and again while there is none, and returns
            soon after its argument is set.
        expect: Told in how many seconds there is news of the copy; 0 if it failed.
    """

    def __init__(
        self,
        image: Image,
        make_copy: Callable[[threading.Event], HostCopy | None],
        expect: Callable[[float], None],
    ) -> None:
        self.copy: HostCopy | None = None
        self.source = CopySource(image, self._say_further)
        self._image = image
        self._make_copy = make_copy
        self.on_copied: Callable[[], None] = lambda: None
        self._expect = expect
        self._say_at = 0.0
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    def begin(self) -> None:
        """Begin, if it has not begun."""
        if self._thread is None:
            self._say_further()
            self._thread = threading.Thread(target=self._run, name="kvcached-weights", daemon=True)
            self._thread.start()

    def join(self) -> None:
        """Return when it has ended."""
        if self._thread is not None:
            self._thread.join()

    def stop(self) -> None:
        """End it soon, and return then; what is complete stays."""
        self._stop.set()
        self.join()

    def _run(self) -> None:
        try:
            copy = self._have_copy()
        except Exception:
            logger.exception("kvcached: the weights could not be copied, so they stay")
            copy = None
        self.copy = copy
        if copy is None:
            self._expect(0)
            return
        logger.info(
            "kvcached: %s of weights may be given to neighbours: host memory has them (%s)",
            format_bytes(self._image.layout.num_bytes),
            "shared" if copy.is_shared else "of this process alone",
        )
        self.on_copied()

    def _have_copy(self) -> HostCopy | None:
        pauses = self._pauses()
        while (copy := self._make_copy(self._stop)) is None:
            if not next(pauses):
                return None
        with ExitStack() as undo:
            undo.callback(copy.close)
            pauses = self._pauses()
            while not complete(copy, self._image.backend, self.source, self._stop):
                if not next(pauses):
                    return None
            undo.pop_all()
        return copy

    def _pauses(self) -> Iterator[bool]:
        """Wait before each further try, and yield whether there shall be one."""
        seconds = FIRST_RETRY_SECONDS
        while True:
            self._expect(0)  # nobody shall wait for a copy that may come in minutes, or never
            is_over = self._stop.wait(seconds)
            self._say_at = 0.0
            self._say_further()
            yield not is_over
            seconds = min(2 * seconds, LAST_RETRY_SECONDS)

    def _say_further(self) -> None:
        now = time.monotonic()
        if self.copy is None and now >= self._say_at:
            self._say_at = now + NEWS_SECONDS
            self._expect(COPY_SECONDS)
