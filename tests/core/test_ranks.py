"""Several ranks of one server are told the same, and know the same room."""

from typing import Any

import pytest

from kvcached_core.engine.engine import ElasticEngine
from kvcached_core.engine.ranks import Ranks


class Ledgers:
    """Rank 0's view: so much room, of which it is promised what is told."""

    def __init__(self, granted: int) -> None:
        self.granted = granted
        self.num_cancelled = 0

    def has_news(self) -> bool:
        return False

    def room_pages(self) -> int:
        return 10

    def reserve(self, _num_pages: int, **_: Any) -> int:
        return self.granted

    def cancel(self, num_pages: int) -> None:
        self.num_cancelled += num_pages


def test_all_ranks_are_promised_what_the_first_one_is_and_know_the_same_room() -> None:
    said: list[list[int]] = []

    def tell(values: list[int]) -> list[int]:
        said.append(values)
        return values

    seat: Any = None
    first = Ranks(Ledgers(4), seat, 0, tell)  # type: ignore[arg-type]
    second = Ranks(None, seat, 0, lambda _values: said.pop(0))
    for rank in (first, second):
        rank.look()
        assert rank.room_pages == 10
        assert rank.reserve(6, is_urgent=True) == 4
        assert rank.room_pages == 6
        rank.cancel(1)
        assert rank.room_pages == 7


@pytest.mark.parametrize("num_bytes", [0, 5])
def test_every_rank_takes_part_in_a_wake_whatever_it_allocates(num_bytes: int) -> None:
    calls: list[str] = []

    def share(values: list[int]) -> list[int]:
        calls.append("share")
        return values

    def largest(values: list[int]) -> list[int]:
        calls.append("largest")
        return values

    seat: Any = None
    engine = ElasticEngine(Ranks(None, seat, 0, share, largest), port=seat)
    with engine.room_to_wake(num_bytes):
        calls.append("wake")
    engine.close()
    assert calls == ["largest", "share", "wake"]
