"""The weights of one rank: given from the end of the image, and brought back from the host's copy.

A page that is what its copy is, is dropped; one that has changed is written back before. All pages
in front of the first that is missing are there, so who schedules knows the state by one number.
"""

import contextlib
import logging
import os
import threading
from collections.abc import Callable
from functools import partial

from kvcached_core.errors import BackendError, HostCopyError, OutOfMemoryError
from kvcached_core.memory.seats import Seat
from kvcached_core.memory.torch_device import release_cached_blocks
from kvcached_core.memory.vmm.backend import Handle
from kvcached_core.weights.annex import Annex
from kvcached_core.weights.arriving import Arriving
from kvcached_core.weights.changes import Changes
from kvcached_core.weights.copying import Copying
from kvcached_core.weights.drop_batches import drop_batches
from kvcached_core.weights.exporting import Wish
from kvcached_core.weights.fetching import Fetching
from kvcached_core.weights.host_copy import HostCopy
from kvcached_core.weights.image import Image
from kvcached_core.weights.mapped_pages import mapped_pages
from kvcached_core.weights.moving_out import MovingOut
from kvcached_core.weights.rank_annex import RankAnnex
from kvcached_core.weights.rank_row import WeightsRow
from kvcached_core.weights.replicas import Replicas
from kvcached_core.weights.status import WeightStatus

logger = logging.getLogger("kvcached")


class RankWeights:
    """An image, its copy on the host, and their part of the ledger.

    Its methods are for the worker's thread, between two steps.

    Attributes:
        copying: The copy on the host, and what makes it.
        arriving: The pages that come back, where steps wait for each part of them by themselves.
        lets_arrive: Whether they do. Who launches anything else calls `arriving.finish` before.

    Args:
        image: The image; what of it is resident is there, all of it as a rule.
        make_copy: Returns the host copy, complete or to be filled, or None if there is no room for
            one now. It is called in a thread of its own, again and again while there is none, and
            returns soon after its argument is set.
        current_stream: Returns the stream that the engine's steps are launched on.
        replicas: Others with these weights; None if nothing comes from them, nor goes to them.
    """

    def __init__(
        self,
        image: Image,
        make_copy: Callable[[threading.Event], HostCopy | None],
        current_stream: Callable[[], int] = lambda: 0,
        replicas: Replicas | None = None,
    ) -> None:
        self.image = image
        self._pid = os.getpid()
        self._row = WeightsRow(image.arena, lambda: self._num_resident_pages)
        self.copying = Copying(image, make_copy, self._row.expect)
        self._moving_out = MovingOut(self.copying, make_copy, image.backend)
        self.copying.on_copied = self._when_copied
        self.arriving = Arriving(image.backend, current_stream, image.page_bytes)
        self.arriving.on_lost, self.arriving.on_finished = self._lose, self._offer_read
        self.lets_arrive = False
        self._current_stream = current_stream
        self._changes = Changes(self._moving_out.back, self.copying.source)
        self._replicas = replicas
        # A page whose content could not be brought is resident, and not there.
        self._num_there = image.num_resident_pages
        self._annex = RankAnnex(image.page_bytes, self._row, current_stream)

    def status(self) -> WeightStatus:
        """Return how much is there, and whether more may be dropped. Any thread may call it.

        The annex counts as further pages behind the last one.
        """
        image, num_there, is_copied = self.image, self._num_there, self.copying.copy is not None
        if num_there == image.num_pages:
            num_there += self._annex.num_resident_pages
        return WeightStatus(
            image.num_pages + self._annex.num_pages, num_there, image.page_bytes, is_copied
        )

    def add_annex(self, annex: Annex) -> None:
        """Let an annex go and come with the weights: it goes first and comes last.

        It is there now. What it gets later goes with it, too.
        """
        self._annex.annex = annex
        self._row.report()

    def join(self, seat: Seat) -> None:
        """From now on, tell the ledger of the rank's device what is resident.

        Raises:
            LedgerError: If the ledger cannot be used.
        """
        self._row.join(seat)

    def begin_copy(self) -> None:
        """Begin to have a copy on the host, behind the engine's back; `status` says when it is.

        Call it when the engine is ready: what it captures as a graph must not meet another thread's
        copies.
        """
        self.copying.begin()

    def mark_dirty(self) -> None:
        """Take every page for changed, because somebody has written weights on purpose."""
        self._changes.mark(range(self.image.num_pages))

    def hold(self, num_pages: int) -> WeightStatus:
        """Have exactly the first `num_pages` there, or all if there are not so many.

        The annex is there when all are; otherwise it goes before the first of them. Where it has to
        stay, as many pages go in its place.

        Pages go when all work of the engine's stream is done. Work that is launched on it later
        finds the pages that came, or waits for them by `arriving`, which may begin to copy them as
        late as that; the host does not wait. Nothing is dropped that cannot be brought back:
        without a copy, or without room for what has changed, pages stay.

        Returns:
            What is there then: less than was wanted if others took the memory for it.

        Raises:
            BackendError: If the backend fails; the pages in front of that are there.
            HostCopyError: If the copy went to the disk, and is not there any more.
            LedgerError: If the instance has left the ledger.
        """
        wanted = min(num_pages, self.image.num_pages)
        wants_annex = num_pages >= self.image.num_pages + self._annex.num_pages
        try:
            self.arriving.finish()
            self._drop_unfinished()
            copy = self.copying.copy
            if copy is None:
                return self.status()
            if not wants_annex:
                self._annex.drop(self._wait_for_device)
                if self._annex.num_resident_pages and wanted == self.image.num_pages:
                    wanted = max(num_pages - self._annex.num_pages, 0)  # weights go in its place
            if wanted > self._num_there and self._replicas is not None:
                self._fetch(self._replicas, copy, wanted)
            if wanted > self._num_there:
                copy = self._moving_out.back()
                if copy is None:
                    self._drop_unfinished()
                    return self.status()
                self._bring(copy, wanted)
            elif wanted < self._num_there:
                self._give(copy, wanted)
            if wants_annex:
                self._annex.bring()
        except OutOfMemoryError as error:
            # Others than engines took it. What came stays, and the rest is asked for again.
            self._drop_unfinished()
            logger.warning("kvcached: %s; requests wait for the rest of the weights", error)
        finally:
            self._offer_read()
            self._row.report()
        return self.status()

    def close(self) -> None:
        """Give everything back; in a forked child, which owns nothing, do nothing.

        No tensor over the image may be used any more.
        """
        if os.getpid() != self._pid:
            return
        self.copying.stop()
        if self._replicas is not None:
            self._replicas.close()
        self._moving_out.close()
        copy, self.copying.copy = self.copying.copy, None
        with contextlib.ExitStack() as rest:
            rest.callback(self._row.close)
            rest.callback(self.image.close)
            if copy is not None:
                rest.callback(copy.close)
            with contextlib.suppress(BackendError):  # a device that failed has nothing to wait for
                self._wait_for_device()
        self._num_there = 0

    @property
    def _num_resident_pages(self) -> int:
        return self.image.num_resident_pages + self._annex.num_resident_pages

    def _when_copied(self) -> None:
        copy, replicas = self.copying.copy, self._replicas
        if copy is not None and replicas is not None:
            replicas.export(copy.digest, self._find_pages)
        self._moving_out.offer_unread()

    def _find_pages(self, wish: Wish) -> list[Handle]:
        """Return the memory of what a replica wants, see `Exporting`."""
        copy, image = self.copying.copy, self.image
        if copy is None or (copy.digest, image.page_bytes) != (wish.digest, wish.page_bytes):
            return []
        end = wish.first + self._changes.num_clean(copy, wish.first, wish.sums)
        end = min(end, self._num_there - self.arriving.num_unbegun)
        image.backend.finish_copies()  # some may have come just now
        return [image.arena.handle(page) for page in range(wish.first, end)]

    def _give(self, copy: HostCopy, num_pages: int) -> None:
        unread = contextlib.nullcontext() if self._replicas is None else self._replicas.unread()
        try:
            with unread:
                self._give_clean(copy, num_pages)
        except HostCopyError as error:
            logger.warning("kvcached: changed weights stay on the device: %s", error)
        except OutOfMemoryError as error:
            logger.warning("kvcached: weights stay, nobody can see if they changed: %s", error)

    def _give_clean(self, copy: HostCopy, num_pages: int) -> None:
        self._wait_for_device()
        source = self.copying.source
        batches = list(drop_batches(self._num_there, num_pages))
        look = source.begin_sums(*batches[0])
        for (first, _), following in zip(batches, [*batches[1:], None], strict=True):
            if not self._changes.write_back(copy, first, look()):
                return
            if following is not None:  # the device looks while the host drops
                look = source.begin_sums(*following)
            self._num_there = first
            self._drop_unfinished()
            if following is None:
                # Whom the last report wakes may need this memory too, and nobody rings for it.
                release_cached_blocks()
            self._row.report()

    def _fetch(self, replicas: Replicas, copy: HostCopy, num_pages: int) -> None:
        """Have pages from replicas, as far as they have them; the rest comes from the copy."""
        image, first, source = self.image, self._num_there, self.copying.source

        def count(num_right: int) -> None:
            self._num_there += num_right

        wish = Wish(copy.digest, image.page_bytes, first, copy.known_sums(first, num_pages))
        stream = self._current_stream()
        fetching = Fetching(image, self._row, replicas.backend, source, stream, count)
        replicas.fetch(wish, fetching.take)

    def _bring(self, copy: HostCopy, num_pages: int) -> None:
        image, begin = self.image, partial(self.image.copy_from, copy.page_address)
        pages = mapped_pages(image, self._row, self._num_there, num_pages)
        with contextlib.ExitStack() as rest:
            rest.callback(self.arriving.forget)
            rest.callback(image.backend.join_copies, self._current_stream())
            rest.callback(self.arriving.begin_rest)
            if not self.lets_arrive:
                for page in pages:
                    begin(page)
                    self._num_there = page + 1
                return
            try:
                list(pages)
            finally:  # Behind all maps, which go in step with copies that have begun; see ADR 23.
                for page in range(self._num_there, image.num_resident_pages):
                    self.arriving.expect(page, begin)
                    self._num_there = page + 1
            rest.pop_all()

    def _offer_read(self) -> None:
        if not self.arriving.is_pending:
            self._moving_out.offer()

    def _lose(self, num_pages: int) -> None:
        """Count no more than the first pages as there: others could not be copied."""
        self._num_there = min(self._num_there, num_pages)

    def _drop_unfinished(self) -> None:
        """Drop resident pages that do not count as there."""
        if surplus := self.image.num_resident_pages - self._num_there:
            self.image.backend.finish_copies()  # a part of one that failed may be on its way
            self.image.drop_last(surplus)

    def _wait_for_device(self) -> None:
        """Return when nothing reads or writes a page any more."""
        self.image.backend.fence(self._current_stream()).wait()
        self.image.backend.finish_copies()
        self.arriving.forget()
