"""Several ranks of one server are told the same, and know the same room."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from kvcached_core.engine.beside import Turn
from kvcached_core.engine.engine import ElasticEngine
from kvcached_core.engine.ranks import Ranks, WantedPages
from kvcached_core.ledger.weights import WeightsWish
from kvcached_core.weights.status import WeightStatus, merge


class Ledgers:
    """Rank 0's view: so much room, of which it is promised what is told."""

    def __init__(self, granted: int) -> None:
        self.granted = granted
        self.num_cancelled = 0

    def has_news(self) -> bool:
        return False

    def room_pages(self) -> int:
        return 10

    def promise(self, _num_pages: int, **_: Any) -> int:
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
        assert rank.promise(6, is_urgent=True) == 4
        assert rank.room_pages == 6
        rank.cancel(1)
        assert rank.room_pages == 7


@pytest.mark.parametrize("is_busy", [True, False])
def test_what_is_wanted_is_read_again_on_all_ranks_when_there_is_no_news(*, is_busy: bool) -> None:
    said: list[list[int]] = []

    def tell(values: list[int]) -> list[int]:
        said.append(values)
        return values

    ledgers: Any = Ledgers(0)
    ledgers.wanted_pages = lambda: (3, 1)
    ledgers.beside = SimpleNamespace(wish=lambda: 0)
    seat: Any = None
    first = Ranks(ledgers, seat, 0, tell)
    second = Ranks(None, seat, 0, lambda _values: said.pop(0))
    for rank in (first, second):
        assert rank.look(is_busy=is_busy, is_again=True) == WantedPages(3, 1)


@pytest.mark.parametrize("num_bytes", [0, 5])
def test_every_rank_takes_part_in_a_wake_whatever_it_allocates(num_bytes: int) -> None:
    calls: list[str] = []

    def share(values: list[int]) -> list[int]:
        calls.append("share")
        return values

    def gather(values: list[int]) -> list[list[int]]:
        calls.append("gather")
        return [values]

    seat: Any = None
    engine = ElasticEngine(Ranks(None, seat, 0, share, gather), port=seat)
    with engine.room_to_wake(num_bytes):
        calls.append("wake")
    engine.close()
    assert calls == ["gather", "share", "wake", "gather"]  # all have allocated before it ends


class TwoRanks:
    """Two ranks, one of which acts first: what it is told, the other one is told in turn."""

    def __init__(self, turn: Turn) -> None:
        self.said: list[list[int]] = []
        self.did: list[str] = []
        beside = SimpleNamespace(
            ask_to_wake=lambda _: turn,
            woke=lambda *_: self.did.append("woke"),
            stop_waking=lambda: self.did.append("stop"),
            offer_weights=lambda *_, **__: self.did.append("offer"),
            describe_weights=lambda _: self.did.append("describe"),
            end_wish=lambda _: self.did.append("end wish"),
            explain_shortage=lambda: "1 GiB is missing",
        )
        first: Any = SimpleNamespace(beside=beside, close=lambda: None)
        seat: Any = None
        self.ranks = [
            Ranks(first, seat, 0, self._say),
            Ranks(None, seat, 0, self._hear),
        ]

    def _say(self, values: list[int]) -> list[int]:
        self.said.append(values)
        return values

    def _hear(self, values: list[int]) -> list[int]:
        said = self.said.pop(0)
        assert len(values) == len(said)
        return said

    def both(self, act: Callable[[Ranks], Any]) -> Any:
        """Let both do the same; return what came of it, the same for both."""
        one, other = (act(rank) for rank in self.ranks)
        assert one == other
        assert self.said == []  # none said what the other one does not wait for
        return one


@pytest.mark.parametrize("turn", Turn)
def test_both_ranks_have_their_weights_back_in_the_same_turn(turn: Turn) -> None:
    two = TwoRanks(turn)
    assert two.both(lambda ranks: ranks.ask_to_wake(5)) is turn
    for ranks in two.ranks:
        ranks.describe_weights(5)
        ranks.offer_weights(5, is_kept=True)
        ranks.woke(2, 1)
        ranks.stop_waking()
        ranks.end_wish(WeightsWish.WAKE)
    assert two.did == ["describe", "offer", "woke", "stop", "end wish"]  # by the first alone
    assert two.both(lambda ranks: ranks.is_over(0.0))
    assert [ranks.explain_shortage() for ranks in two.ranks] == ["1 GiB is missing", "see rank 0"]


@pytest.mark.parametrize("other", [(9, 7, 32, True), (4, 0, 64, False)])
def test_weights_of_ranks_that_schedule_alike_are_merged_on_each(
    other: tuple[int, int, int, bool],
) -> None:
    statuses = WeightStatus(8, 3, 64, is_copied=True), WeightStatus(*other)
    said: list[list[int]] = []

    def gather(values: list[int]) -> list[list[int]]:
        said.append(values)
        return [values, list(other)]

    seat: Any = None
    merged = Ranks(None, seat, 0, lambda values: values, gather).merge(statuses[0])
    assert merged == merge(statuses)
    assert said == [[8, 3, 64, 1]]


def test_no_rank_gives_weights_if_one_keeps_them() -> None:
    seat: Any = None
    none = [0, 0, 0, 0]
    ranks = Ranks(None, seat, 0, lambda values: values, lambda values: [values, none])
    assert ranks.merge(WeightStatus(8, 3, 64, is_copied=True)) is None
    assert ranks.merge(None) is None


def test_weights_that_one_scheduler_has_merged_stay_as_they_are() -> None:
    seat: Any = None
    merged = merge([WeightStatus(8, 3, 64, is_copied=True)] * 2)
    assert Ranks(None, seat, 0).merge(merged) is merged
