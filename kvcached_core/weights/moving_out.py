"""The host copy of a rank's weights while nobody reads it: it goes to the disk for others.

It is read only to bring weights to the device, or to write changed ones back. Otherwise the process
listens beside it. Who needs the room rings, and the process writes the copy to the disk, keeps that
open, and gives the copy up. It has it back before it is read the next time.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from kvcached_core.errors import BackendError, HostCopyError, LedgerError
from kvcached_core.ledger.bell import Doorbell
from kvcached_core.weights.host_budget import OnDisk
from kvcached_core.weights.host_bytes import Pinning
from kvcached_core.weights.host_copy import HostCopy
from kvcached_core.weights.offers import bell_of

# After a try without room in host memory; each time twice as long.
FIRST_PAUSE_SECONDS, LAST_PAUSE_SECONDS = 0.1, 2.0

logger = logging.getLogger("kvcached")


class Copying(Pinning, Protocol):
    """What a memory backend does with a copy."""

    def finish_copies(self) -> None:
        """Return when every copy has ended that was begun."""


class HasCopy(Protocol):
    """Where a rank has its copy."""

    copy: HostCopy | None


class MovingOut:
    """The host copy of one rank's weights, which others may ask for. Any thread may call it.

    Args:
        place: Where the copy is, once it is complete.
        make_copy: Returns a copy of the weights again, or None if there is no room for one now.
        backend: What page-locks it and copies from it.
    """

    def __init__(
        self,
        place: HasCopy,
        make_copy: Callable[[threading.Event], HostCopy | None],
        backend: Copying,
    ) -> None:
        self._place, self._make_copy, self._backend = place, make_copy, backend
        self._lock, self._is_read = threading.Lock(), False
        self._offer: _Offer | None = None
        self._image: OnDisk | None = None
        self._pause_seconds = FIRST_PAUSE_SECONDS

    def offer_unread(self) -> None:
        """Do what `offer` does, unless somebody reads the copy already."""
        with self._lock:
            if not self._is_read:
                self._begin_offer()

    def offer(self) -> None:
        """Let others have the room of the copy from now on, if there is one that can go.

        Whoever had it `back` has read it.
        """
        with self._lock:
            self._is_read = False
            self._begin_offer()

    def back(self) -> HostCopy | None:
        """Return the copy to be read, in host memory, and let nobody have it until `offer`.

        From the disk it takes what the disk takes.

        Returns:
            None if there is none, or host memory has no room for it now, after a pause.

        Raises:
            HostCopyError: If it went and is not there any more. Then the copy is lost.
        """
        with self._lock:
            self._is_read = True
            self._withdraw()
            copy = self._place.copy
            if self._image is None or copy is None:
                if copy is not None:
                    copy.say_used()
                return copy
            found = self._make_copy(threading.Event())
            if found is None:
                # An engine asks again at once, and whoever has the room tells nobody when it goes.
                time.sleep(self._pause_seconds)
                self._pause_seconds = min(2 * self._pause_seconds, LAST_PAUSE_SECONDS)
                return None
            self._pause_seconds = FIRST_PAUSE_SECONDS
            if found.sums != copy.sums:
                found.close()
                raise HostCopyError(
                    f"{self._image.path} is not what it was when the weights went there; start the "
                    "engine anew, it reads the model's files then"
                )
            found.pin(self._backend, threading.Event())
            self._image.close()
            self._image, self._place.copy = None, found
            return found

    def close(self) -> None:
        """Offer it no longer; what is on the disk stays."""
        with self._lock:
            self._withdraw()
            if self._image is not None:
                self._image.close()
                self._image = None

    def _begin_offer(self) -> None:
        copy = self._place.copy
        if self._offer or self._image or copy is None or not copy.may_move_out:
            return
        try:
            self._offer = _Offer(copy, self._backend)
        except LedgerError as error:
            logger.debug("kvcached: a host copy cannot be asked for: %s", error)

    def _withdraw(self) -> None:
        if self._offer is not None:
            self._image = self._offer.end()
            self._offer = None


class _Offer:
    """A copy that goes when somebody rings."""

    def __init__(self, copy: HostCopy, backend: Copying) -> None:
        self._copy, self._backend = copy, backend
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._image: OnDisk | None = None
        self._path = bell_of(copy.path)
        self._bell = Doorbell(self._path, self._go)

    def end(self) -> OnDisk | None:
        """Stop it; return the image if the copy went."""
        self._stop.set()
        self._bell.close()
        return self._image

    def _go(self) -> None:
        if self._image is not None or self._stop.is_set():
            return
        try:
            self._backend.finish_copies()  # the device may still read what it was told to
            image = self._copy.save(self._stop)
        except (HostCopyError, BackendError) as error:
            if not self._stop.is_set():
                logger.warning("kvcached: the host copy of weights stays in memory: %s", error)
        else:
            self._image = image
            self._copy.close()
            logger.info("kvcached: the host copy of %s went to the disk", self._copy.name)
        finally:
            self._path.unlink(missing_ok=True)  # whoever rang sees that it is over
