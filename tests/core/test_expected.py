"""What an engine that starts waits for: weights that will be offered, and no longer than that."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcached_core.ledger.expected import (
    START_SECONDS,
    Patience,
    Stage,
    expected,
    num_starting,
)
from kvcached_core.ledger.file import Row, RowKey
from kvcached_core.ledger.view import DeviceView, InstanceView, view_of

SECOND = 1_000_000_000
NOW = 1000 * SECOND
SECONDS = 10.0
EMPTY = view_of(Row(memoryview(bytearray(8 * 64)).cast("q"), index=0, base=0))
OWN = replace(EMPTY, row=RowKey(0, 1), name="own")
SOON = NOW + SECOND


def peer(number: int = 1, **words: Any) -> InstanceView:
    return replace(EMPTY, row=RowKey(number, number + 1), name=f"peer-{number}", **words)


def device(*peers: InstanceView, own: InstanceView = OWN) -> DeviceView:
    return DeviceView("host", 100, (own, *peers))


def stages(*peers: InstanceView, own: InstanceView = OWN, **options: bool) -> list[Stage]:
    view = device(*peers, own=own)
    return [one.stage for one in expected(view, own, NOW, **options)]


STARTING = peer(static_bytes=40, weights_kept_until_ns=SOON)
COPYING = peer(2, resident_bytes=50, weights_bytes=40, weights_kept_until_ns=SOON)
KEPT = replace(COPYING, weights_offered_bytes=40)


def test_what_starts_what_copies_and_what_is_kept_will_be_offered() -> None:
    assert stages(STARTING, COPYING, KEPT) == [Stage.LOADING, Stage.COPYING, Stage.KEPT]
    assert num_starting(device(STARTING, COPYING, KEPT), OWN, NOW) == 1


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"weights_kept_until_ns": 0}, id="it never said so, or said that it failed"),
        pytest.param({"weights_kept_until_ns": NOW}, id="its time is over"),
        pytest.param({"waking_since_ns": 1}, id="it stands in the line itself"),
        pytest.param({"static_bytes": 0, "weights_bytes": 0}, id="it holds nothing"),
    ],
)
def test_nothing_else_is_waited_for(other: dict[str, int]) -> None:
    assert stages(replace(STARTING, **other)) == []
    assert stages(replace(COPYING, **other)) == []


def test_a_higher_priority_need_not_wait_for_what_is_kept() -> None:
    assert stages(COPYING, KEPT, own=replace(OWN, priority=1)) == [Stage.COPYING]


def test_who_has_loaded_waits_for_nobody_without_a_page() -> None:
    assert stages(STARTING, COPYING, has_loaded=True) == [Stage.COPYING]


def test_nobody_waits_for_itself() -> None:
    own = replace(STARTING, row=OWN.row)
    assert stages(own=own) == []


class Clock:
    """Time as a test says it."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def ns(self) -> int:
        return NOW + round(self.seconds * SECOND)

    def patience(self) -> Patience:
        return Patience(SECONDS, clock=self, clock_ns=self.ns)


def test_a_start_waits_as_long_as_a_copy_gets_further_and_a_while_after_it() -> None:
    clock = Clock()
    patience = clock.patience()
    for _ in range(100):
        clock.seconds += 59
        copying = replace(COPYING, weights_kept_until_ns=clock.ns() + 60 * SECOND)
        assert not patience.is_over([(device(copying), OWN.row)])
        assert [one.name for one in patience.waits_for] == ["peer-2"]
    clock.seconds += 61  # nothing was said of it since
    assert patience.is_over([(device(copying), OWN.row)])
    assert patience.waits_for == []


def test_a_start_that_waits_for_nothing_waits_a_while() -> None:
    clock = Clock()
    patience = clock.patience()
    clock.seconds = SECONDS - 0.1
    assert not patience.is_over([(device(), OWN.row)])
    clock.seconds = SECONDS
    assert patience.is_over([(device(), OWN.row)])


def test_a_peer_that_died_is_waited_for_no_more() -> None:
    clock = Clock()
    patience = clock.patience()
    far = replace(COPYING, weights_kept_until_ns=NOW + 60 * SECOND)
    clock.seconds = 20
    assert not patience.is_over([(device(far), OWN.row)])
    clock.seconds = 20 + SECONDS
    assert patience.is_over([(device(), OWN.row)])


def test_weights_that_come_back_again_and_again_are_waited_for_once() -> None:
    clock = Clock()
    patience = clock.patience()
    while clock.seconds < 2 * SECONDS:
        kept = replace(KEPT, weights_kept_until_ns=clock.ns() + 5 * SECOND)
        if patience.is_over([(device(kept), OWN.row)]):
            break
        clock.seconds += 1
    assert clock.seconds == pytest.approx(SECONDS + 4)


def test_a_time_that_is_too_far_is_not_believed() -> None:
    far = NOW + round((START_SECONDS + 1) * SECOND)
    patience = Clock().patience()
    patience.is_over([(device(replace(KEPT, weights_kept_until_ns=far)), OWN.row)])
    assert patience.waits_for == []


WORDS = st.fixed_dictionaries(
    {
        "static_bytes": st.integers(0, 2),
        "weights_bytes": st.integers(0, 2),
        "weights_offered_bytes": st.integers(0, 2),
        "waking_since_ns": st.integers(0, 1),
        "priority": st.integers(-1, 1),
        "promised_bytes": st.integers(0, 1),
        "lasts": st.floats(0, 2 * START_SECONDS),
    }
)


@given(st.lists(WORDS, max_size=4), st.lists(st.floats(0, 30), min_size=1, max_size=60))
def test_whatever_peers_say_once_a_start_waits_no_longer_than_that(
    peers: list[dict[str, Any]], pauses: list[float]
) -> None:
    clock = Clock()
    views = []
    for number, words in enumerate(peers):
        until_ns = NOW + round(words.pop("lasts") * SECOND)
        resident = words["weights_bytes"]
        views.append(
            peer(number + 1, resident_bytes=resident, weights_kept_until_ns=until_ns, **words)
        )
    patience = clock.patience()
    waited_until = 0.0
    for pause in pauses:
        clock.seconds += pause
        is_over = patience.is_over([(device(*views), OWN.row)])
        if patience.waits_for:
            waited_until = clock.seconds
            assert all(one.until_ns > clock.ns() for one in patience.waits_for)
        assert is_over == (clock.seconds >= waited_until + SECONDS)
    assert waited_until <= START_SECONDS * 2
