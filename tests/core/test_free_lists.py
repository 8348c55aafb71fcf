"""Which block comes next, and what the pages of the free ones are for."""

import pytest
from helpers.page_source import FakeBlock

from kvcached_core.engine.free_lists import CACHED, CLOSED, EMPTY, USED, FreeLists
from kvcached_core.errors import PageStateError
from kvcached_core.memory.geometry import Geometry

GEOMETRY = Geometry(block_bytes=1024, num_planes=4, ids_per_page=16, blocks_per_page=4)


def make(num_open: int = 6, num_pages: int = 6) -> FreeLists[FakeBlock]:
    def blocks_of(page: int) -> list[FakeBlock]:
        first = page * GEOMETRY.blocks_per_page
        return [FakeBlock(GEOMETRY.block_id(first + index)) for index in range(4)]

    free_lists: FreeLists[FakeBlock] = FreeLists(GEOMETRY, num_pages, blocks_of)
    for page in range(num_open):
        free_lists.add(page)
    return free_lists


def page_of(block: FakeBlock | None) -> int:
    assert block is not None
    return GEOMETRY.page_of(block.block_id)


def test_blocks_come_in_id_order_from_the_lowest_page() -> None:
    assert [block.block_id for block in make().take(6)] == [0, 1, 2, 3, 16, 17]


def test_no_more_blocks_are_taken_than_there_are() -> None:
    free_lists = make(2)
    assert len(free_lists.take(100)) == 8
    assert free_lists.num_free == 0
    assert free_lists.take_one() is None
    assert free_lists.take(1) == []


def test_a_page_that_was_fuller_once_comes_behind_those_that_are_fuller_now() -> None:
    free_lists = make(3)
    blocks = free_lists.take(12)
    free_lists.give([*blocks[0:2], *blocks[4:6]])  # pages 0 and 1: two live each
    assert page_of(free_lists.take_one()) == 0
    free_lists.give([*blocks[6:8], *blocks[8:11]])  # page 1: none live; page 2: one
    assert [page_of(free_lists.take_one()) for _ in range(3)] == [0, 2, 2]


def test_the_next_block_comes_from_the_fullest_page() -> None:
    free_lists = make(4)
    blocks = free_lists.take(16)
    free_lists.give([blocks[0], blocks[1], blocks[2]])  # page 0: one live
    free_lists.give([blocks[5]])  # page 1: three live
    free_lists.give([blocks[8], blocks[9]])  # page 2: two live
    assert [page_of(free_lists.take_one()) for _ in range(6)] == [1, 2, 2, 0, 0, 0]


def test_a_page_that_was_full_once_and_emptied_since_is_not_the_fullest() -> None:
    free_lists = make(4)
    blocks = free_lists.take(16)
    free_lists.give([blocks[12], blocks[4], blocks[5]])
    assert page_of(free_lists.take_one()) == 3  # page 1 is known with two free blocks
    free_lists.give([blocks[6], blocks[7]])
    free_lists.give([blocks[0], blocks[1], blocks[2]])
    assert [page_of(block) for block in free_lists.take(4)] == [0, 0, 0, 1]


def test_single_blocks_here_and_there_come_before_those_of_an_emptier_page() -> None:
    free_lists = make(6)
    blocks = free_lists.take(20)
    free_lists.give(blocks[1::4])
    assert sorted(page_of(block) for block in free_lists.take(5)) == [0, 1, 2, 3, 4]
    assert page_of(free_lists.take_one()) == 5


def test_what_is_in_hand_is_seen_where_pages_are_asked_for() -> None:
    free_lists = make(2)
    first = free_lists.take(1)
    assert free_lists.num_empty_pages(is_live=True) == 1
    free_lists.give(first)
    assert free_lists.num_empty_pages(is_live=True) == 1
    assert free_lists.num_empty_pages(is_live=False) == 2
    assert free_lists.empty_pages() == [1, 0]
    assert free_lists.num_free == 8


def test_what_comes_back_to_the_page_in_hand_is_taken_before_other_pages() -> None:
    free_lists = make(2)
    blocks = free_lists.take(6)  # two of page 1 are left in hand
    free_lists.give([blocks[4], blocks[0]])
    assert [page_of(free_lists.take_one()) for _ in range(4)] == [1, 1, 1, 0]


def test_after_a_schedule_the_next_block_comes_from_the_fullest_page_whatever_was_in_hand() -> None:
    free_lists = make(2)
    blocks = free_lists.take(8)
    free_lists.give([blocks[4], blocks[5], blocks[0]])
    free_lists.num_empty_pages(is_live=True)
    assert [page_of(free_lists.take_one()) for _ in range(3)] == [0, 1, 1]


def test_a_page_that_emptied_is_seen_at_once_while_requests_are_live() -> None:
    free_lists = make(2)
    blocks = free_lists.take(8)
    assert free_lists.num_empty_pages(is_live=True) == 0
    free_lists.give(blocks[:4])
    assert free_lists.num_empty_pages(is_live=True) == 1


def test_single_blocks_are_taken_from_the_hand_and_given_back_like_many() -> None:
    free_lists = make(2)
    assert free_lists.in_hand == []
    assert free_lists.fill_hand()
    block = free_lists.take_in_hand()
    assert (block.block_id, free_lists.num_free) == (0, 7)
    free_lists.give_one(block)
    assert free_lists.num_free == 8
    assert len(free_lists.take(100)) == 8
    assert not free_lists.fill_hand()


def test_the_page_that_is_empty_for_longest_goes_first() -> None:
    free_lists = make(4)
    blocks = free_lists.take(16)
    for page in (2, 0, 1):
        free_lists.give(blocks[4 * page : 4 * page + 4])
        assert page in free_lists.pages_in(EMPTY)
    assert free_lists.empty_pages() == [2, 0, 1]


def test_a_page_is_cached_when_nothing_but_the_prefix_cache_wants_its_blocks() -> None:
    free_lists = make(4)
    blocks = free_lists.take(16)
    queue = [4, 8, 0, 9, 5, 1, 10, 11, 2, 3, 6]  # page 1 keeps one live block, page 3 four
    free_lists.add_cached([blocks[index] for index in queue])
    assert free_lists.pages_in(CACHED) == [0, 2]
    assert free_lists.pages_in(USED) == [1, 3]
    assert free_lists.count_pages() == (2, 2)
    free_lists.remove_cached([blocks[8]])
    assert free_lists.count_pages() == (3, 1)
    free_lists.give([blocks[8]])
    assert free_lists.count_pages() == (2, 2)


def test_only_empty_pages_can_be_removed() -> None:
    free_lists = make(2)
    free_lists.take(1)
    with pytest.raises(PageStateError, match="page 0 cannot be closed: it is not empty"):
        free_lists.remove([0])
    with pytest.raises(PageStateError, match="page 5"):
        free_lists.remove([5])


def test_a_block_of_a_removed_page_is_never_taken() -> None:
    free_lists = make(3, 3)
    blocks = free_lists.take(4)
    free_lists.give(blocks)
    free_lists.take_one()  # page 0 is in hand
    free_lists.remove([1])
    assert {page_of(block) for block in free_lists.take(100)} == {0, 2}
    assert free_lists.pages_in(CLOSED) == [1]
    free_lists.add(1)
    assert {page_of(block) for block in free_lists.take(100)} == {1}


def test_cached_pages_come_when_their_youngest_block_does() -> None:
    free_lists = make(3)
    blocks = free_lists.take(12)
    free_lists.give(blocks[0:2])
    queue = [blocks[4], blocks[2], blocks[5], blocks[3], blocks[8], blocks[6], blocks[7]]
    free_lists.add_cached(queue)  # page 2 has live blocks beside its cached one
    assert [page_of(page[0]) for page in free_lists.cached_pages(iter(queue))] == [0, 1]


def test_pages_of_which_there_are_copies_come_before_others_each_in_their_order() -> None:
    free_lists = make(4)
    blocks = free_lists.take(16)
    free_lists.add_cached(blocks)
    copied = {*blocks[4:8], *blocks[8:11], *blocks[12:16]}  # of page 2 all but one
    found = free_lists.cached_pages(iter(blocks), copied.__contains__)
    assert [page_of(page[0]) for page in found] == [1, 3, 0, 2]
