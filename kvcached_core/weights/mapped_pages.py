"""Memory under the pages of weights that come back, and the ledger told of it now and then.

What is mapped was announced before, so it is counted until then, too.
"""

from collections.abc import Generator

from kvcached_core.weights.image import Image
from kvcached_core.weights.rank_row import WeightsRow

BATCH_PAGES = 4  # that are mapped before the ledger is told of them


def mapped_pages(image: Image, row: WeightsRow, first: int, end: int) -> Generator[int]:
    """Map pages as they are asked for, and yield each; those that are mapped stay as they are.

    Args:
        image: Their image.
        row: Its part of the ledger.
        first: The first page; all in front of it are mapped.
        end: Behind the last one.

    Raises:
        OutOfMemoryError: If there is no memory, and neighbours give none.
        BackendError: If the backend fails.
    """
    try:
        for page in range(first, end):
            if page == image.num_resident_pages:
                missing_bytes = (end - page) * image.page_bytes
                row.with_patience(lambda: image.map_next(1), missing_bytes)
            yield page
            if (page + 1 - first) % BATCH_PAGES == 0:
                row.report()
    finally:
        row.report()
