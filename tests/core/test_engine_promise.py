"""What a schedule is promised: whatever is missing, or each pool its share of what there is."""

from types import SimpleNamespace
from typing import Any

import pytest

from kvcached_core.engine.engine import ElasticEngine
from kvcached_core.engine.page_book import PageBook
from kvcached_core.engine.pages import Pages
from kvcached_core.memory.geometry import Geometry

NUM_PAGES = 64
PER_PAGE = (4, 8)  # blocks of the first pool, and of the second


class Ledger:
    """Promises pages while it has room for some."""

    def __init__(self, room_pages: int) -> None:
        self.room_pages = room_pages

    def promise(self, num_pages: int, *, is_urgent: bool, num_spare: int = 0) -> int:
        assert is_urgent
        granted = min(num_pages + num_spare, self.room_pages)
        self.room_pages -= granted
        return granted


def promise(room_pages: int, *num_blocks: int) -> list[int]:
    """Return the pages that each pool is promised when it needs so many blocks."""
    ledger: Any = Ledger(room_pages)
    blocks: Any = SimpleNamespace(add=lambda _page: None)
    book = PageBook(NUM_PAGES)
    engine: Any = ElasticEngine.__new__(ElasticEngine)
    engine.ranks = ledger
    engine.pools = [
        Pages(Geometry(1024, 1, number, number), NUM_PAGES, ledger, blocks, shared=book)
        for number, _ in zip(PER_PAGE, num_blocks, strict=False)
    ]
    engine.promise(num_blocks)
    return [pages.num_promised for pages in engine.pools]


@pytest.mark.parametrize(
    ("room_pages", "num_blocks", "promised"),
    [
        (10, (9,), [3]),
        (2, (9,), [2]),
        (10, (9, 9), [3, 2]),
        (10, (-5, 8), [0, 1]),
        (6, (32, 32), [4, 2]),  # of 8 and 4
        (3, (32, 32), [2, 1]),
        (0, (32, 32), [0, 0]),
    ],
)
def test_where_there_is_less_than_all_pools_need_each_has_its_share(
    room_pages: int, num_blocks: tuple[int, ...], promised: list[int]
) -> None:
    assert promise(room_pages, *num_blocks) == promised
