"""Two numbers say whether a page is what it was: what a plain sum misses, they notice."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kvcached_core.memory.vmm.host import HostBackend
from kvcached_core.units import KIB, MIB
from kvcached_core.weights.image import Image
from kvcached_core.weights.layout import lay_out
from kvcached_core.weights.sums import begin_page_sums, begin_sums_of

PAGE = 64 * KIB
WORDS = PAGE // 8
TOP_BIT = -(1 << 63)


def random_words(num_words: int = WORDS) -> torch.Tensor:
    limit = 1 << 62
    return torch.randint(-limit, limit, (num_words,), generator=torch.Generator().manual_seed(0))


def sums(words: torch.Tensor) -> tuple[int, int]:
    (found,) = begin_sums_of(words.view(torch.int8), 1)()
    return found


@given(st.integers(0, WORDS - 1), st.integers(0, WORDS - 1))
@settings(max_examples=50)
def test_two_words_that_are_swapped_show(one: int, other: int) -> None:
    words = random_words()
    before = sums(words)
    words[[one, other]] = words[[other, one]]
    assert (sums(words) != before) == (one != other)


@given(st.integers(0, WORDS - 1), st.integers(0, 63))
@settings(max_examples=50)
def test_a_single_bit_shows_in_both_numbers(place: int, bit: int) -> None:
    words = random_words()
    rows, columns = sums(words)
    words[place] ^= TOP_BIT if bit == 63 else 1 << bit
    assert sums(words)[0] != rows
    assert sums(words)[1] != columns


@given(st.integers(0, WORDS - 1), st.integers(0, WORDS - 1))
@settings(max_examples=50)
def test_two_signs_that_change_show(one: int, other: int) -> None:
    words = random_words()
    before = sums(words)
    words[one] ^= TOP_BIT
    words[other] ^= TOP_BIT  # in a plain sum the two cancel
    assert (sums(words) != before) == (one != other)


def test_words_that_are_swapped_inside_a_row_or_a_column_show() -> None:
    words = random_words()
    before = sums(words)
    table = words.clone().view(128, 64)  # more rows than columns, as `sums_of` lays them
    within_row, within_column = table.clone(), table.clone()
    within_row[5, [1, 9]] = table[5, [9, 1]]
    within_column[[5, 77], 3] = table[[77, 5], 3]
    assert sums(within_row.view(-1))[1] != before[1]
    assert sums(within_column.view(-1))[0] != before[0]


def test_zeros_in_other_places_have_other_sums() -> None:
    found = set()
    for place in range(0, WORDS, 97):
        words = torch.zeros(WORDS, dtype=torch.int64)
        words[place] = 1
        found.add(sums(words))
    assert len(found) == len(range(0, WORDS, 97))


@pytest.mark.parametrize("num_pages", [1, 5, 16, 17, 37])
def test_pages_of_a_run_have_the_sums_that_they_have_alone(num_pages: int) -> None:
    words = random_words(num_pages * WORDS)
    together = begin_sums_of(words.view(torch.int8), num_pages)()
    alone = [sums(words[page * WORDS : (page + 1) * WORDS]) for page in range(num_pages)]
    assert together == alone
    assert len(set(together)) == num_pages


def test_what_sums_take_meanwhile_does_not_grow_with_the_pages() -> None:
    pages = torch.empty(64 * 64 * MIB, dtype=torch.int8, device="meta")
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, _types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            made = func(*args, **(kwargs or {}))
            for one in tree_leaves(made):
                storage = one.untyped_storage()
                if storage._cdata != pages.untyped_storage()._cdata:
                    sizes.append(storage.nbytes())
            return made

    with Sizes(), pytest.raises(NotImplementedError):  # there is nothing to read at the end
        begin_sums_of(pages, 64)()
    assert sizes
    assert max(sizes) < MIB  # for more, torch takes 20 MiB of the device


@pytest.mark.parametrize("num_words", [512, 1536, 1 << 13, 3 << 12, 7 * 512])
def test_any_length_of_a_page_has_sums(num_words: int) -> None:
    words = random_words(num_words)
    before = sums(words)
    words[num_words - 1] += 1
    assert sums(words) != before


def test_sums_of_an_image_touch_the_pages_that_they_are_of() -> None:
    image = Image(HostBackend(), lay_out([("a", 50 * MIB)], 2 * MIB))
    image.map_next(3)
    words = image.pages_tensor(0, 3).view(torch.int64)
    words.copy_(random_words(words.numel()))
    assert begin_page_sums(image, 1, 2)() == begin_sums_of(words.view(torch.int8), 3)()[1:]
    assert begin_page_sums(image, 25, 0)() == []
    image.close()
