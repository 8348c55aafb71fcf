"""The host copy of one rank's weights: opened, believed or filled, and never changed under others.

A copy is shared where it can be, else this process's own, else there is none and the weights stay
on the device. All of it takes seconds, so it runs in a thread behind the start of an engine.
"""

import logging
import threading
from collections.abc import Collection, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Protocol

from kvcached_core.errors import HostBudgetError, HostCopyError, OutOfMemoryError
from kvcached_core.units import format_bytes
from kvcached_core.weights.host_budget import Claim, HostBudget, OnDisk
from kvcached_core.weights.host_bytes import HostBytes, Pinning, touched
from kvcached_core.weights.host_file import SharedFile
from kvcached_core.weights.record import PageSums, Shape

# How often a page is copied that changes under the copy, before the whole is left for later.
_TRIES = 3

logger = logging.getLogger("kvcached")


class Source(Protocol):
    """The resident pages of an image, as far as a copy is taken of them."""

    def sums(self, first: int, num_pages: int) -> Sequence[PageSums]:
        """Return the sums of a run of pages as they are on the device now."""

    def copy_out(self, page: int, host_address: int) -> None:
        """Copy a page to host memory; return when it is done."""


class HostCopy:
    """A copy of all pages of an image, in host memory. One thread at a time uses it.

    Attributes:
        num_bytes: Of all pages.
        sums: Of each page, what they were on the device when its bytes here were the same; None
            where its bytes here are of no use.
    """

    def __init__(
        self,
        shape: Shape,
        budget: HostBudget,
        whole: HostBytes,
        file: SharedFile | None = None,
        claim: Claim | None = None,
    ) -> None:
        self.num_bytes = shape.num_bytes
        self.sums: list[PageSums | None] = [None] * shape.num_pages
        if file is not None and file.sums is not None:
            self.sums[:] = file.sums
        self._shape, self._budget = shape, budget
        self._whole, self._file = whole, file
        self._claims = [] if claim is None else [claim]
        self._own: list[HostBytes] = []
        self._own_addresses: dict[int, int] = {}
        self._pinning: Pinning | None = None

    @property
    def name(self) -> str:
        """The model, for people."""
        return self._shape.key.name

    @property
    def digest(self) -> str:
        """That of the key of its weights."""
        return self._shape.key.digest

    def known_sums(self, first: int, end: int) -> list[PageSums]:
        """Return those of pages from `first` to `end`, up to the first of which none are known."""
        return [sums for sums in takewhile(bool, self.sums[first:end]) if sums is not None]

    @property
    def is_complete(self) -> bool:
        """Whether every page can be had from here."""
        return None not in self.sums

    @property
    def is_shared(self) -> bool:
        """Whether other processes may read pages of it."""
        return self._file is not None and self._file.sums is not None

    @property
    def path(self) -> Path:
        """The shared file; it is an error to ask a copy that `may_move_out` says no of."""
        if self._file is None:
            raise HostCopyError(f"the copy of {self._shape.key.name} is in no file")
        return self._file.path

    @property
    def may_move_out(self) -> bool:
        """Whether all of it is in a finished file, and there is a disk for that."""
        has_disk = self._budget.disk is not None
        return has_disk and self.is_shared and self.is_complete and not self._own

    def save(self, stop: threading.Event) -> OnDisk:
        """Have it on the disk, too; it stays what it is.

        Raises:
            HostCopyError: If it cannot go there, or `stop` was set.
        """
        disk, file = self._budget.disk, self._file
        if disk is None or file is None:
            raise HostCopyError(f"there is no disk for the copy of {self._shape.key.name}")
        return disk.put(file.path, file.fd, stop)

    def say_used(self) -> None:
        """Note that it is read now: others' copies go before it."""
        if self._file is not None and self.is_shared:
            self._file.say_used()

    def page_address(self, page: int) -> int:
        """Return where the bytes of a page are now; a page never lies in two registrations."""
        own = self._own_addresses.get(page)
        return self._whole.address + page * self._shape.page_bytes if own is None else own

    def pin(self, backend: Pinning, stop: threading.Event) -> bool:
        """Let `backend` page-lock all of it; return whether it did, see `HostBytes.pin`."""
        self._pinning = backend
        return self._whole.pin(backend, stop)

    def agrees(self, source: Source) -> bool:
        """Return whether every page is what the device has."""
        return list(source.sums(0, self._shape.num_pages)) == self.sums

    def distrust(self) -> None:
        """Let no start have its weights from here."""
        if self._file is not None:
            self._file.distrust()

    def start_over(self) -> None:
        """Believe nothing of it any more. What others believe of it stays as it is."""
        name = self._shape.key.name
        if self._file is None or not self.is_shared or self._file.start_over():
            logger.warning("kvcached: the host copy of %s is of other weights; filled again", name)
        else:
            logger.warning(
                "kvcached: another process uses %s for other weights than these of %s, which get "
                "a copy of their own",
                self._file.path,
                name,
            )
        self.sums[:] = [None] * self._shape.num_pages

    def fill(self, source: Source, stop: threading.Event) -> bool:
        """Copy every page that is not here, and let others use the copy if nobody does yet.

        Returns:
            Whether all are here; not if `stop` was set, or a page did not stand still.

        Raises:
            HostCopyError: If others use the file, and there is no room for pages of one's own.
        """
        missing = [page for page, sums in enumerate(self.sums) if sums is None]
        self.own(missing)
        for page in missing:
            if stop.is_set() or not self._take(page, source):
                return False
        self._publish(stop)
        return True

    def write_back(self, pages: Collection[int], source: Source) -> bool:
        """Take pages that have changed on the device; return whether all of them stood still.

        A shared file is not changed: its pages get a place of their own here.

        Raises:
            HostCopyError: If there is no room for that; nothing changed, and the pages must stay.
        """
        self.own(pages)
        stood_still = True
        for page in pages:
            stood_still &= self._take(page, source)
        return stood_still

    def own(self, pages: Collection[int]) -> None:
        """Give pages of a shared file memory of this process; nothing is in it yet.

        Raises:
            HostCopyError: If there is none; nothing changed.
        """
        missing = [page for page in pages if page not in self._own_addresses]
        if not missing or not self.is_shared:
            return
        num_bytes = len(missing) * self._shape.page_bytes
        claim = self._budget.claim(self._shape.key.name, num_bytes)
        try:
            taken = touched(num_bytes, self._shape.page_bytes, threading.Event())
        except OSError as error:
            claim.close()
            raise HostBudgetError(
                f"the host has no {format_bytes(num_bytes)} for changed weights of "
                f"{self._shape.key.name}: {error.strerror}",
                num_bytes,
                self._budget.budget_bytes,
            ) from error
        if self._pinning is not None:
            taken.pin(self._pinning, threading.Event())
        self._claims.append(claim)
        self._own.append(taken)
        for place, page in enumerate(missing):
            self._own_addresses[page] = taken.address + place * self._shape.page_bytes
            self.sums[page] = None
        if len(self._own_addresses) == self._shape.num_pages:
            self._leave_file()

    def close(self) -> None:
        """Give everything back; no copy may be under way. A finished shared file stays."""
        for taken in self._own:
            taken.close()
        self._leave_file()
        for claim in self._claims:
            claim.close()

    def _take(self, page: int, source: Source) -> bool:
        self.sums[page] = None
        for _ in range(_TRIES):
            (before,) = source.sums(page, 1)
            source.copy_out(page, self.page_address(page))
            (after,) = source.sums(page, 1)
            if before == after:
                self.sums[page] = after
                return True
        return False

    def _publish(self, stop: threading.Event) -> None:
        if self._file is None or self._file.sums is not None:
            return
        checksums = self._whole.checksums(stop)
        if stop.is_set():
            return
        try:
            self._file.publish([sums for sums in self.sums if sums is not None], checksums)
        except OSError as error:
            logger.warning(
                "kvcached: %s cannot be shared: %s; this process keeps it for itself",
                self._file.path,
                error.strerror,
            )
            self._file.discard()
            self._file = None
        else:
            while self._claims:
                self._claims.pop().close()  # from now on the file counts by its size

    def _leave_file(self) -> None:
        self._whole.close()
        if self._file is not None:
            self._file.close()
            self._file = None


def complete(copy: HostCopy, backend: Pinning, source: Source, stop: threading.Event) -> bool:
    """Page-lock a copy from `open_copy`, and fill it unless it is what the device has.

    Returns:
        Whether every page is in it. If not, it may be tried again later.
    """
    copy.pin(backend, stop)
    try:
        if copy.is_complete and not copy.agrees(source):
            copy.start_over()
        return copy.is_complete or copy.fill(source, stop)
    except (HostCopyError, OutOfMemoryError) as error:
        logger.warning("kvcached: these weights stay on the device: %s", error)
        return False
