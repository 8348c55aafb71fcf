"""How many cards a split needs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multi_model.cards import num_cards, static_needs
from multi_model.modes import SLEEPING_BYTES

CARD = 100


def test_a_models_need_is_its_weights_its_most_kv_and_what_an_engine_holds_beside() -> None:
    found = static_needs([7, 9], [1, 2])
    assert found == [8 + SLEEPING_BYTES, 11 + SLEEPING_BYTES]


def test_a_hole_that_a_large_model_left_takes_a_small_one() -> None:
    assert num_cards([30, 70, 60, 40], CARD) == 2
    assert num_cards([51, 51, 51], CARD) == 3
    assert num_cards([CARD], CARD) == 1
    assert num_cards([], CARD) == 0


def test_a_model_larger_than_a_card_fits_on_none() -> None:
    assert num_cards([1, CARD + 1], CARD) is None


@given(st.lists(st.integers(1, CARD), max_size=30))
def test_the_number_is_between_what_the_sum_needs_and_one_each(needs: list[int]) -> None:
    found = num_cards(needs, CARD)
    assert found is not None
    assert -(-sum(needs) // CARD) <= found <= len(needs)
    assert found <= 2 * sum(needs) / CARD + 1  # at most one card is half empty


def test_two_halves_share_a_card() -> None:
    assert num_cards([50] * 7, CARD) == pytest.approx(4)
