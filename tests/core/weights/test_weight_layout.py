"""Where parameters lie: aligned, apart from each other, in their order, on pages of a fit size."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcached_core.errors import GeometryError
from kvcached_core.units import GIB, KIB, MIB
from kvcached_core.weights.layout import (
    ALIGNMENT_BYTES,
    MAX_PAGE_BYTES,
    NUM_PAGES_WANTED,
    Layout,
    choose_page_bytes,
    lay_out,
)

SIZES = st.lists(st.integers(1, 3 * GIB), min_size=1, max_size=40)
GRANULARITIES = st.sampled_from([4 * KIB, 12 * KIB, 64 * KIB, 2 * MIB, 64 * MIB, 512 * MIB])


def laid_out(sizes: list[int], granularity_bytes: int) -> Layout:
    return lay_out([(f"p{index}", size) for index, size in enumerate(sizes)], granularity_bytes)


@given(SIZES, GRANULARITIES)
def test_pieces_are_aligned_keep_their_order_and_have_no_byte_in_common(
    sizes: list[int], granularity_bytes: int
) -> None:
    layout = laid_out(sizes, granularity_bytes)
    assert [piece.name for piece in layout.pieces] == [f"p{index}" for index in range(len(sizes))]
    assert [piece.num_bytes for piece in layout.pieces] == sizes
    end_bytes = 0
    for piece in layout.pieces:
        assert piece.offset_bytes % ALIGNMENT_BYTES == 0
        assert end_bytes <= piece.offset_bytes < end_bytes + ALIGNMENT_BYTES
        end_bytes = piece.end_bytes


@given(SIZES, GRANULARITIES)
def test_an_image_is_no_page_longer_than_its_pieces(
    sizes: list[int], granularity_bytes: int
) -> None:
    layout = laid_out(sizes, granularity_bytes)
    assert layout.num_bytes == layout.num_pages * layout.page_bytes
    assert 0 <= layout.num_bytes - layout.pieces[-1].end_bytes < layout.page_bytes


@given(st.integers(1, 200 * GIB), GRANULARITIES)
def test_a_page_is_large_enough_and_not_larger(num_bytes: int, granularity_bytes: int) -> None:
    page_bytes = choose_page_bytes(num_bytes, granularity_bytes)
    factor, rest = divmod(page_bytes, granularity_bytes)
    assert rest == 0
    assert factor & (factor - 1) == 0
    assert page_bytes <= max(MAX_PAGE_BYTES, granularity_bytes)
    if 2 * page_bytes <= MAX_PAGE_BYTES:
        assert num_bytes <= NUM_PAGES_WANTED * page_bytes
    if factor > 1:
        assert num_bytes > NUM_PAGES_WANTED * page_bytes // 2


@pytest.mark.parametrize(
    ("num_bytes", "granularity_bytes", "page_bytes"),
    [
        (15 * GIB, 2 * MIB, 64 * MIB),
        (2 * GIB, 2 * MIB, 64 * MIB),
        (2 * GIB - 1, 2 * MIB, 64 * MIB),
        (1 * GIB, 2 * MIB, 32 * MIB),
        (64 * MIB, 2 * MIB, 2 * MIB),
        (64 * MIB + 1, 2 * MIB, 4 * MIB),
        (1, 2 * MIB, 2 * MIB),
        (15 * GIB, 128 * MIB, 128 * MIB),
        (15 * GIB, 48 * MIB, 48 * MIB),
    ],
)
def test_examples_of_page_sizes(num_bytes: int, granularity_bytes: int, page_bytes: int) -> None:
    assert choose_page_bytes(num_bytes, granularity_bytes) == page_bytes


@given(SIZES, GRANULARITIES)
def test_a_layout_comes_back_from_its_text(sizes: list[int], granularity_bytes: int) -> None:
    layout = laid_out(sizes, granularity_bytes)
    again = Layout.from_json(layout.to_json())
    assert again == layout
    assert again.digest == layout.digest


def test_a_layout_that_differs_in_anything_has_another_digest() -> None:
    one = lay_out([("a", 1000), ("b", 2000)], MIB)
    others = [
        lay_out([("b", 1000), ("a", 2000)], MIB),
        lay_out([("a", 1000), ("b", 2001)], MIB),
        lay_out([("a", 1000), ("b", 2000)], 2 * MIB),
        lay_out([("a", 1000), ("b", 2000), ("c", 1)], MIB),
    ]
    assert len({one.digest, *(other.digest for other in others)}) == 5


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "null", '{"page_bytes":1,"num_pages":1,"pieces":[["a",0]]}']
)
def test_a_text_that_is_no_layout_is_refused(text: str) -> None:
    with pytest.raises(GeometryError, match="no layout of weights"):
        Layout.from_json(text)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([], "there are 0"),
        ([("a", 0)], "'a' has 0 bytes"),
        ([("a", 5), ("b", -1)], "'b' has -1 bytes"),
        ([("a", 5), ("b", 5), ("a", 6)], "'a' comes twice"),
    ],
)
def test_what_cannot_be_laid_out_is_named(sizes: list[tuple[str, int]], message: str) -> None:
    with pytest.raises(GeometryError, match=message):
        lay_out(sizes, MIB)


def test_a_granularity_that_is_not_positive_is_refused() -> None:
    with pytest.raises(GeometryError, match="granularity_bytes=0"):
        lay_out([("a", 1)], 0)
