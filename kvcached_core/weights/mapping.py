"""Memory under the pages of weights that come back, and the ledger told of it now and then."""

from collections.abc import Iterator

from kvcached_core.weights.image import Image
from kvcached_core.weights.rank_row import WeightsRow

BATCH_PAGES = 4  # that are mapped before the ledger is told of them


class Mapping:
    """Maps the pages of an image, the first missing one next.

    Args:
        image: The image.
        row: Its part of the ledger.
    """

    def __init__(self, image: Image, row: WeightsRow) -> None:
        self._image = image
        self._row = row

    def missing(self, num_pages: int) -> Iterator[int]:
        """Map what is missing of the first pages, and yield each.

        Raises:
            OutOfMemoryError: If there is no memory, and neighbours give none.
            BackendError: If the backend fails.
        """
        while (first := self._image.num_resident_pages) < num_pages:
            for page in range(first, min(first + BATCH_PAGES, num_pages)):
                self._map_next(num_pages)
                yield page
            self._row.report()

    def next_of(self, num_pages: int) -> None:
        """Map the next one of so many.

        Raises:
            OutOfMemoryError: As `missing`.
            BackendError: As `missing`.
        """
        self._map_next(num_pages)
        if self._image.num_resident_pages % BATCH_PAGES == 0:
            self._row.report()

    def _map_next(self, num_pages: int) -> None:
        missing_bytes = (num_pages - self._image.num_resident_pages) * self._image.page_bytes
        self._row.with_patience(lambda: self._image.map_next(1), missing_bytes)
