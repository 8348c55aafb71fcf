"""Who gives memory to whom."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcached_core.errors import PolicyError
from kvcached_core.ledger.file import HEADER_WORDS, NUM_ROWS, ROW_WORDS, Row
from kvcached_core.ledger.policy import Policy, Share, check, shares

NOW = 100


def rows(*sizes: dict[str, int]) -> list[Row]:
    words = memoryview(bytearray(8 * (HEADER_WORDS + NUM_ROWS * ROW_WORDS))).cast("q")
    made = [Row(words, index) for index in range(len(sizes))]
    for row, values in zip(made, sizes, strict=True):
        row.limit_bytes = -1
        for name, value in values.items():
            setattr(row, name, value)
        row.resident_bytes = (
            row.used_bytes + row.cached_bytes + row.weights_bytes + values.get("resident_bytes", 0)
        )
    return made


def asked(asker: Row, peers: list[Row], num_bytes: int) -> dict[int, tuple[int, int]]:
    found = shares(asker, peers, num_bytes, now_ns=NOW)
    return {share.index: (share.give_bytes, share.owed_bytes) for share in found}


def test_idle_memory_goes_before_anybodys_cache() -> None:
    asker, low, high = rows(
        {}, {"cached_bytes": 10, "priority": -1}, {"resident_bytes": 4, "priority": 1}
    )
    assert asked(asker, [low, high], 4) == {high.index: (4, 0)}
    assert asked(asker, [low, high], 6) == {high.index: (4, 0), low.index: (2, 0)}


def test_who_waits_itself_gives_of_its_idle_memory_until_both_hold_the_same() -> None:
    short = {"used_bytes": 60, "resident_bytes": 20, "waiting_bytes": 10, "page_bytes": 4}
    asker, peer = rows({"used_bytes": 50}, short)
    assert asked(asker, [peer], 30) == {peer.index: (12, 0)}
    asker.resident_bytes = 80
    assert asked(asker, [peer], 30) == {}
    asker.priority = 1
    assert asked(asker, [peer], 30) == {peer.index: (20, 0)}


BUSY = {"page_bytes": 4, "waiting_bytes": 10}


def test_of_two_equals_that_wait_the_one_that_holds_more_gives_half_of_the_difference() -> None:
    asker, peer = rows(BUSY | {"used_bytes": 20}, BUSY | {"used_bytes": 62})
    assert asked(asker, [peer], 12) == {peer.index: (12, 0)}
    assert asked(asker, [peer], 20) == {peer.index: (20, 0)}
    peer.used_bytes, peer.cached_bytes = 54, 8  # its cache goes first, and is a part of it
    assert asked(asker, [peer], 20) == {peer.index: (20, 0)}
    peer.coming_bytes = 16  # is as good as the asker's
    assert asked(asker, [peer], 12) == {peer.index: (12, 0)}
    assert asked(asker, [peer], 13) == {peer.index: (8, 0)}


def test_half_of_the_difference_is_asked_for_only_where_it_is_enough() -> None:
    asker, one, two = rows(*(BUSY | {"used_bytes": size} for size in (20, 60, 40)))
    assert asked(asker, [one], 24) == {}
    assert asked(asker, [one, two], 24) == {one.index: (20, 0), two.index: (4, 0)}
    assert asked(asker, [one, two], 28) == {one.index: (20, 0), two.index: (8, 0)}
    assert asked(asker, [one, two], 29) == {}


@pytest.mark.parametrize(
    "other",
    [
        {"waiting_bytes": 0},  # it needs what it has, and no more
        {"used_bytes": 20},  # it holds as much
        {"used_bytes": 4, "page_bytes": 4},  # nothing of it runs
        {"priority": 1},
        {"priority": -1},
        {"floor_bytes": 56},
    ],
)
def test_who_is_not_an_equal_that_waits_and_holds_more_is_not_asked_for_half(
    other: dict[str, int],
) -> None:
    asker, peer = rows(BUSY | {"used_bytes": 20}, BUSY | {"used_bytes": 60} | other)
    assert asked(asker, [peer], 8) == {}


def test_half_is_for_requests_that_wait_and_not_for_an_asker_below_its_floor() -> None:
    asker, peer = rows(BUSY | {"used_bytes": 20}, BUSY | {"used_bytes": 60})
    assert shares(asker, [peer], 8, is_waiting=False) == []
    assert shares(asker, [peer], 8, is_static=True) == []
    asker.floor_bytes = 28  # requests stop for it
    assert asked(asker, [peer], 8) == {peer.index: (0, 8)}


def test_who_waits_with_nothing_running_gives_all_its_idle_memory() -> None:
    idle = {"used_bytes": 4, "resident_bytes": 20, "waiting_bytes": 10, "page_bytes": 4}
    asker, peer = rows({"used_bytes": 50}, idle)
    assert asked(asker, [peer], 30) == {peer.index: (20, 0)}


def test_the_lowest_priority_gives_first_and_among_equals_who_was_unused_longest() -> None:
    asker, high, recent, old = rows(
        {},
        {"cached_bytes": 10, "priority": 5, "last_used_ns": 1},
        {"cached_bytes": 10, "last_used_ns": 9},
        {"cached_bytes": 10, "last_used_ns": 2},
    )
    peers = [high, recent, old]
    assert asked(asker, peers, 10) == {old.index: (10, 0)}
    assert asked(asker, peers, 15) == {old.index: (10, 0), recent.index: (5, 0)}
    assert asked(asker, peers, 30)[high.index] == (10, 0)


def test_what_lies_idle_or_cached_below_a_floor_is_borrowed_last() -> None:
    asker, owner, other = rows(
        {},
        {"cached_bytes": 10, "resident_bytes": 2, "floor_bytes": 7, "priority": -1},
        {"cached_bytes": 4},
    )
    assert asked(asker, [owner, other], 5) == {owner.index: (5, 0)}
    assert asked(asker, [owner, other], 9) == {owner.index: (5, 0), other.index: (4, 0)}
    assert asked(asker, [owner, other], 20) == {owner.index: (12, 0), other.index: (4, 0)}


def test_nobody_is_asked_below_its_floor_for_what_nobody_waits_for() -> None:
    asker, peer = rows({}, {"cached_bytes": 10, "floor_bytes": 7})
    (share,) = shares(asker, [peer], 10, is_waiting=False)
    assert share.give_bytes == 3


def test_weights_go_after_the_cache_of_the_same_instance_and_before_that_of_the_next() -> None:
    asker, recent, old = rows(
        {},
        {"cached_bytes": 10, "weights_bytes": 50, "weights_offered_bytes": 50, "last_used_ns": 9},
        {"cached_bytes": 10, "weights_bytes": 50, "weights_offered_bytes": 50, "last_used_ns": 2},
    )
    recent.resident_bytes += 5  # of whoever has idle pages, these go first
    peers = [recent, old]
    assert asked(asker, peers, 15) == {recent.index: (5, 0), old.index: (10, 0)}
    assert asked(asker, peers, 40) == {recent.index: (5, 0), old.index: (35, 0)}
    assert asked(asker, peers, 70) == {recent.index: (10, 0), old.index: (60, 0)}
    assert asked(asker, peers, 999) == {recent.index: (65, 0), old.index: (60, 0)}


def test_of_a_busy_higher_priority_the_cache_stays_while_a_lower_one_has_weights() -> None:
    offered = {"weights_bytes": 50, "weights_offered_bytes": 50}
    asker, high, low = rows({}, {"cached_bytes": 10, "priority": 1}, offered)
    assert asked(asker, [high, low], 50) == {low.index: (50, 0)}


def test_weights_that_are_not_offered_are_neither_idle_nor_borrowed_nor_below_a_floor() -> None:
    asker, peer = rows({"floor_bytes": 99}, {"weights_bytes": 50, "cached_bytes": 4})
    assert asked(asker, [peer], 60) == {peer.index: (4, 0)}
    peer.floor_bytes, peer.weights_offered_bytes = 4, 20
    assert asked(asker, [peer], 30) == {peer.index: (24, 0)}  # weights first, then below the floor
    assert asked(asker, [peer], 20) == {peer.index: (20, 0)}


def test_only_a_higher_priority_gets_weights_of_who_woke_just_now() -> None:
    kept = {"weights_bytes": 9, "weights_offered_bytes": 9, "weights_kept_until_ns": NOW + 1}
    equal, higher, peer = rows({}, {"priority": 1}, kept)
    assert asked(equal, [peer], 9) == {}
    assert asked(higher, [peer], 9) == {peer.index: (9, 0)}
    peer.weights_kept_until_ns = NOW
    assert asked(equal, [peer], 9) == {peer.index: (9, 0)}


def test_requests_of_lower_priorities_alone_stop_for_who_wakes() -> None:
    asker, low, equal = rows({}, {"used_bytes": 9, "priority": -1}, {"used_bytes": 9})
    peers = [low, equal]
    assert shares(asker, peers, 12, is_waiting=False, is_static=True) == []
    asker.waking_since_ns = 1
    assert shares(asker, peers, 12, is_waiting=False, is_static=True) == [Share(low.index, 0, 9)]
    low.floor_bytes = 4
    assert shares(asker, peers, 12, is_waiting=False, is_static=True) == [Share(low.index, 0, 5)]


def test_weights_that_are_on_their_way_are_not_asked_for_again() -> None:
    asker, peer = rows(
        {},
        {"resident_bytes": 4, "weights_bytes": 9, "weights_offered_bytes": 9, "coming_bytes": 6},
    )
    assert asked(asker, [peer], 20) == {peer.index: (7, 0)}


def test_an_owner_that_waits_itself_keeps_what_lies_below_its_floor() -> None:
    asker, peer = rows({}, {"cached_bytes": 10, "floor_bytes": 7, "waiting_bytes": 1})
    assert asked(asker, [peer], 10) == {peer.index: (3, 0)}


def test_requests_of_a_neighbour_are_never_stopped_below_its_floor() -> None:
    asker, peer = rows(
        {"floor_bytes": 20}, {"used_bytes": 10, "cached_bytes": 2, "floor_bytes": 11}
    )
    assert asked(asker, [peer], 12) == {peer.index: (2, 0)}
    peer.floor_bytes = 4
    assert asked(asker, [peer], 12) == {peer.index: (2, 6)}


def test_a_floor_must_leave_room_for_the_longest_request_of_each_neighbour() -> None:
    own, peer, third = rows(
        {"least_bytes": 1},
        {"least_bytes": 60, "floor_bytes": 10},
        {"least_bytes": 10, "floor_bytes": 30},
    )
    for name, row in (("own", own), ("peer", peer), ("third", third)):
        row.name = name
    check(own, Policy(floor_bytes=10), [peer, third], 100)
    with pytest.raises(
        PolicyError, match=r"'peer' needs 60 B, but floors of 30 B \(third\) \+ 11 B"
    ):
        check(own, Policy(floor_bytes=11), [peer, third], 100)
    check(own, Policy(floor_bytes=11), [peer, third], 100, is_forced=True)
    own.floor_bytes = 20  # forced before: what does not make it worse is not refused for it
    check(own, Policy(floor_bytes=15), [peer, third], 100)


def test_requests_stop_only_for_somebody_below_its_floor() -> None:
    asker, peer = rows({}, {"used_bytes": 10, "cached_bytes": 2})
    assert asked(asker, [peer], 8) == {peer.index: (2, 0)}
    asker.floor_bytes = 5
    assert asked(asker, [peer], 8) == {peer.index: (2, 5)}
    peer.floor_bytes = 9
    assert asked(asker, [peer], 8) == {peer.index: (2, 1)}


def test_idle_memory_that_is_on_its_way_is_not_asked_for_again_but_of_the_next_one() -> None:
    asker, first, second = rows(
        {},
        {"resident_bytes": 4, "coming_bytes": 2, "last_used_ns": 1},
        {"cached_bytes": 9, "last_used_ns": 2},
    )
    assert asked(asker, [first, second], 4) == {first.index: (2, 0), second.index: (2, 0)}


SIZES = st.integers(0, 40)
INSTANCE = st.fixed_dictionaries(
    {
        "used_bytes": SIZES,
        "cached_bytes": SIZES,
        "resident_bytes": SIZES,  # idle, beside the others
        "weights_bytes": SIZES,
        "weights_offered_bytes": SIZES,
        "weights_kept_until_ns": st.sampled_from([0, NOW + 1]),
        "waking_since_ns": st.integers(0, 1),
        "coming_bytes": st.integers(0, 10),
        "waiting_bytes": st.integers(0, 5),
        "floor_bytes": SIZES,
        "priority": st.integers(-1, 1),
    }
)


@given(
    sizes=st.lists(INSTANCE, min_size=2, max_size=5),
    num_bytes=st.integers(0, 200),
    is_static=st.booleans(),
)
def test_whatever_there_is_nobody_is_asked_for_more_than_it_has_or_than_is_lacking(
    sizes: list[dict[str, int]], num_bytes: int, *, is_static: bool
) -> None:
    asker, *peers = rows(*sizes)
    found = shares(asker, peers, num_bytes, is_static=is_static, now_ns=NOW)
    assert sum(share.give_bytes + share.owed_bytes for share in found) <= num_bytes
    by_index = {peer.index: peer for peer in peers}
    for share in found:
        peer = by_index[share.index]
        idle = peer.resident_bytes - peer.weights_bytes - peer.used_bytes - peer.cached_bytes
        offered = min(peer.weights_bytes, peer.weights_offered_bytes)
        if peer.weights_kept_until_ns > NOW and asker.priority <= peer.priority:
            offered = 0
        assert share.give_bytes <= idle + peer.cached_bytes + offered
        assert share.owed_bytes <= peer.used_bytes
        if share.owed_bytes and is_static:
            assert asker.waking_since_ns
            assert peer.priority < asker.priority
        elif share.owed_bytes:
            assert share.owed_bytes <= asker.unmet_floor_bytes
