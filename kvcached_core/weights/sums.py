"""Whether a page is still what it was: two numbers of each page, taken where the page is.

A page is seen as a table of 64-bit words. Its rows are added up, and its columns; these sums are
scrambled, each with its place, and added up again: one number of the rows, one of the columns. So
words that were swapped show, and so do two changes that a plain sum would not notice.
"""

from collections.abc import Callable
from math import isqrt
from typing import TYPE_CHECKING, Any

from kvcached_core.weights.image import Image

if TYPE_CHECKING:
    import torch

Sums = tuple[int, int]

# Pages whose numbers are taken at a time: what torch has in between stays below a MiB for each
# tensor. For a larger one it would take 20 MiB of a device that is asked for memory.
_MAX_PAGES = 16
# The constants of SplitMix64, as signed 64-bit numbers: torch has no others of that size.
_STEP = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST_FACTOR = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND_FACTOR = 0x94D049BB133111EB - (1 << 64)


def begin_page_sums(image: Image, first: int, num_pages: int) -> Callable[[], list[Sums]]:
    """Begin to take the sums of `num_pages` resident pages from `first` on.

    It runs on torch's current stream of the device, behind what that was given before.

    Returns:
        What waits for the sums, and returns them. The pages have to stay until then.
    """
    if not num_pages:
        return list
    return begin_sums_of(image.pages_tensor(first, num_pages), num_pages)


def begin_sums_of(pages: "torch.Tensor", num_pages: int) -> Callable[[], list[Sums]]:
    """Begin to take the sums of pages that lie one behind the other; see `begin_page_sums`.

    Args:
        pages: Their bytes, on any device; aligned to words.
        num_pages: How many they are; each a multiple of 8 bytes long.
    """
    import torch  # noqa: PLC0415  the core needs torch nowhere else

    words = pages.view(torch.int64).view(num_pages, -1)
    tables = words.view(num_pages, -1, _num_columns(words.shape[1])).split(_MAX_PAGES)
    numbers = torch.cat(
        [
            torch.stack([_scrambled(table.sum(dim=2)), _scrambled(table.sum(dim=1))], dim=1)
            for table in tables
        ]
    )
    return lambda: [(rows, columns) for rows, columns in numbers.tolist()]


def _num_columns(num_words: int) -> int:
    """Return the power of two that makes a table of so many words about square."""
    columns = 1
    while 2 * columns <= isqrt(num_words) and num_words % (2 * columns) == 0:
        columns *= 2
    return columns


def _scrambled(sums: Any) -> Any:
    """Return one number for each row of `sums`; all arithmetic is modulo 2^64."""
    import torch  # noqa: PLC0415

    places = torch.arange(1, sums.shape[1] + 1, dtype=torch.int64, device=sums.device)
    mixed = sums + places * _STEP
    mixed = (mixed ^ (mixed >> 30)) * _FIRST_FACTOR
    mixed = (mixed ^ (mixed >> 27)) * _SECOND_FACTOR
    return (mixed ^ (mixed >> 31)).sum(dim=1)
