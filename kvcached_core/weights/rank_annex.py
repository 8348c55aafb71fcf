"""What goes with the weights of a rank, counted like further pages behind the last one."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvcached_core.errors import HostCopyError, OutOfMemoryError
from kvcached_core.memory.torch_device import release_cached_blocks
from kvcached_core.weights.rank_row import WeightsRow

if TYPE_CHECKING:
    from kvcached_core.weights.annex import Annex

logger = logging.getLogger("kvcached")


class RankAnnex:
    """The annex of a rank, if it has one. Its methods are for the worker's thread.

    Attributes:
        annex: The annex; None until the engine is ready, or if nothing goes with its weights.

    Args:
        page_bytes: The size of a page of the image.
        row: Where memory for it is asked for.
        current_stream: Returns the stream that the engine's steps are launched on.
    """

    def __init__(self, page_bytes: int, row: WeightsRow, current_stream: Callable[[], int]) -> None:
        self.annex: Annex | None = None
        self._page_bytes, self._row, self._current_stream = page_bytes, row, current_stream

    @property
    def num_pages(self) -> int:
        """Those that it would fill: it grows with what is captured later. Any thread may ask."""
        annex_bytes = 0 if self.annex is None else self.annex.num_bytes
        return -(-annex_bytes // self._page_bytes)

    @property
    def num_resident_pages(self) -> int:
        """Those that it fills: all or none. Any thread may ask."""
        return self.num_pages if self.annex is not None and self.annex.is_there else 0

    def bring(self) -> None:
        """Have it there; steps on the current stream wait for what it brings.

        Raises:
            OutOfMemoryError: If others took the memory for it.
            BackendError: If the backend fails.
        """
        annex = self.annex
        if annex is None or annex.is_there:
            return
        self._row.with_patience(annex.bring, annex.num_bytes)
        stream = self._current_stream()
        annex.backend.join(stream)
        annex.backend.join_copies(stream)

    def drop(self, wait_for_device: Callable[[], None]) -> None:
        """Have it gone, if the host has room for it.

        Args:
            wait_for_device: Returns when nothing reads or writes it any more.
        """
        annex = self.annex
        if annex is None:
            return
        if not annex.is_there and not annex.resident_bytes:  # some is left where a backend failed
            return
        wait_for_device()
        try:
            annex.drop()
        except (HostCopyError, OutOfMemoryError) as error:
            logger.warning("kvcached: buffers and graphs stay on the device: %s", error)
        release_cached_blocks()
