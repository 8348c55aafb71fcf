"""Which pages copies hold, until when, and what is heard of the end."""

from kvcached_core.engine.holds import Holds
from kvcached_core.engine.page_book import PageBook

PAGES = range(8)


def test_a_page_is_held_until_all_who_hold_it_have_let_go() -> None:
    holds = Holds()
    holds.hold([1, 2], "a")
    holds.hold([2, 3], "b")
    holds.hold([2, 4], "a")  # a second part of the same copy
    assert holds.held_of(PAGES) == {1, 2, 3, 4}
    assert holds.num_holders == 2
    holds.release("a")
    assert holds.held_of(PAGES) == {2, 3}
    holds.release("a")
    assert holds.held_of([3]) == {3}
    holds.release("b")
    assert not holds
    assert holds.held_of(PAGES) == set()


def test_pages_of_one_copy_may_be_found_now_and_later_and_in_parts() -> None:
    holds = Holds()
    holds.hold_later(lambda: [1, 2], "a")
    holds.hold_later(lambda: [2, 3], "a")
    holds.hold([4], "a")
    assert holds.num_holders == 1
    assert holds.held_of(PAGES) == {1, 2, 3, 4}
    holds.hold_later(lambda: [5], "a")
    holds.release("a")
    assert not holds
    assert holds.held_of(PAGES) == set()


def test_what_was_freed_is_held_until_copies_of_it_are_made() -> None:
    holds = Holds()
    first, second = holds.freed_ids(16), holds.freed_ids(4)
    first += [15, 16, 17]
    second.append(20)
    assert holds
    assert holds.held_of(PAGES) == {0, 1, 5}
    assert holds
    first.append(32)
    assert holds.held_of(PAGES) == {0, 1, 2, 5}
    holds.hold([1], "a")
    holds.settle()
    assert holds.held_of(PAGES) == {1}
    assert (first, second) == ([], [])


def test_the_end_of_a_hold_is_heard_once_and_of_none_nothing() -> None:
    holds = Holds()
    holds.release("a")
    holds.settle()
    assert not holds.has_ended
    holds.hold([1], "a")
    holds.release("a")
    assert holds.has_ended
    holds.has_ended = False
    freed = holds.freed_ids(1)
    for is_looked_at in (False, True):
        freed.append(1)
        if is_looked_at:
            holds.held_of(PAGES)
        holds.settle()
        assert holds.has_ended
        holds.has_ended = False


def test_only_what_somebody_waits_for_is_due() -> None:
    holds = Holds()
    holds.hold([1], "a")
    holds.num_awaited = 1
    assert not holds.is_due
    holds.release("a")
    assert holds.is_due
    holds.num_awaited = 0
    assert not holds.is_due


def test_nothing_is_held_any_more_after_all_is_dropped() -> None:
    holds = Holds()
    holds.freed_ids(1).append(3)
    holds.hold([1], "a")
    holds.hold([2], "b")
    holds.drop()
    assert not holds
    assert holds.has_ended
    assert (holds.num_holders, holds.held_of(PAGES)) == (0, set())


def test_pages_that_are_dear_to_find_are_found_when_somebody_looks() -> None:
    holds, asked = Holds(), []
    holds.hold_later(lambda: asked.append("a") or [1, 2], "a")  # type: ignore[func-returns-value]
    holds.hold_later(lambda: asked.append("b") or [3], "b")  # type: ignore[func-returns-value]
    assert holds
    assert holds.num_holders == 2
    assert holds.held_of([]) == set()
    assert not asked
    holds.release("b")
    assert holds.has_ended
    assert holds.held_of(PAGES) == {1, 2}
    assert holds.held_of(PAGES) == {1, 2}
    assert asked == ["a"]
    holds.hold_later(lambda: [4], "c")
    holds.drop()
    assert not holds
    assert holds.held_of(PAGES) == set()


def test_pages_of_two_arenas_are_held_apart() -> None:
    holds = Holds()
    first, second = PageBook(10, holds=holds), PageBook(10, first_page=10, holds=holds)
    second.hold_later(lambda: {3}, "copy")
    holds.freed_ids(4, second.first_page).append(9)
    assert first.held_of([2, 3]) == set()
    assert second.held_of([2, 3, 4]) == {2, 3}
    holds.release("copy")
    holds.settle()
    assert second.held_of([2, 3, 4]) == set()
