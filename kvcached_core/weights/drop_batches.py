"""In which batches pages of weights are given: the last ones first, and more with each batch."""

from collections.abc import Iterator

# Pages that are given first: whoever asked has them while the others still go. A further batch is
# twice as large: each is told to the ledger, and waits for the device once.
DROP_BATCH_PAGES, MAX_DROP_BATCH_PAGES = 8, 64


def drop_batches(num_there: int, num_pages: int) -> Iterator[tuple[int, int]]:
    """Yield the first page of each batch that goes, and how many they are.

    Args:
        num_there: How many pages there are.
        num_pages: How many of them stay.
    """
    batch_pages = DROP_BATCH_PAGES
    while num_there > num_pages:
        first = max(num_there - batch_pages, num_pages)
        yield first, num_there - first
        num_there = first
        batch_pages = min(2 * batch_pages, MAX_DROP_BATCH_PAGES)
