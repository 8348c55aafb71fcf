"""Which blocks a tier has copies of, and when that is no longer sure."""

from kvcached_core.engine.copied import CopiedBlocks


def test_a_block_has_a_copy_once_that_is_complete_and_as_long_as_it_holds_the_same() -> None:
    copied = CopiedBlocks(10)
    copied.begin("job", [(1, "a"), (2, "b"), (3, None)])
    assert not copied.has(1, "a")
    copied.end("job")
    assert copied.has(1, "a")
    assert copied.has(2, "b")
    assert not copied.has(2, "c")  # taken for something else since
    assert not copied.has(3, None)
    assert not copied.has(4, "d")
    copied.end("job")
    copied.end("a load")
    assert copied.has(1, "a")


def test_what_the_tier_may_have_dropped_for_later_copies_is_not_sure() -> None:
    copied = CopiedBlocks(3)
    for number in range(5):
        copied.begin(number, [(number, "content")])
        copied.end(number)
    assert [copied.has(number, "content") for number in range(5)] == [
        False,
        False,
        True,
        True,
        True,
    ]
    copied.begin(9, [(0, "content")])  # and copied again
    copied.end(9)
    assert copied.has(0, "content")
    assert not copied.has(2, "content")


def test_nothing_is_known_of_a_tier_that_was_emptied() -> None:
    copied = CopiedBlocks(3)
    copied.begin("first", [(1, "a")])
    copied.end("first")
    copied.begin("second", [(2, "b")])
    copied.clear()
    copied.end("second")
    assert not copied.has(1, "a")
    assert not copied.has(2, "b")
