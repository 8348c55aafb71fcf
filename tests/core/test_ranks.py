"""Several ranks of one server are told the same, and know the same room."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from kvcached_core.engine.beside import Turn
from kvcached_core.engine.engine import ElasticEngine
from kvcached_core.engine.ranks import Ranks
from kvcached_core.ledger.weights import WeightsWish
from kvcached_core.weights.status import WeightStatus


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
            Ranks(first, seat, 0, self._say, self._say),
            Ranks(None, seat, 0, self._hear, self._hear),
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


def test_ranks_lack_what_the_one_lacks_that_lacks_most_and_give_nothing_if_one_keeps_it() -> None:
    two = TwoRanks(Turn.NOW)
    status = WeightStatus(8, 3, 64, is_copied=True)
    assert two.both(lambda ranks: ranks.merge(status)) == status
    seat: Any = None
    for other, merged in (
        ([0, 9, 2, 32, 0], WeightStatus(9, 4, 64, is_copied=True)),
        ([0, 4, 4, 64, 1], WeightStatus(8, 3, 64, is_copied=False)),
        ([1, 0, 0, 0, 1], None),
    ):
        ranks = Ranks(
            None,
            seat,
            0,
            largest=lambda values, other=other: [*map(max, values, other)],  # type: ignore[misc]
        )
        assert ranks.merge(status) == merged
