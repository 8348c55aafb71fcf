"""Sizes as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcached_core.errors import ConfigError
from kvcached_core.units import MAX_BYTES, format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("24GiB", 24 << 30), ("512 MiB", 512 << 20), ("1GB", 10**9), ("1.5KiB", 1536), ("7", 7)],
)
def test_sizes_mean_what_people_mean(text: str, num_bytes: int) -> None:
    assert parse_bytes(text, what="X") == num_bytes


def test_a_share_is_one_of_the_whole() -> None:
    assert parse_bytes("50%", what="X", whole_bytes=10) == 5


@pytest.mark.parametrize("text", ["", "-1GiB", "lots", "12 parsecs", "101%", "50%%"])
def test_nonsense_is_refused_by_name_and_value(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_bytes(text, what="KVCACHED_LIMIT", whole_bytes=100)
    assert f"KVCACHED_LIMIT={text!r}" in str(caught.value)
    assert "24GiB" in str(caught.value)


@pytest.mark.parametrize("text", ["1048577TiB", "9" * 30, "9" * 5000 + "GiB"])
def test_a_size_that_no_ledger_can_count_is_refused(text: str) -> None:
    assert parse_bytes("1048576TiB", what="X") == MAX_BYTES
    with pytest.raises(ConfigError) as caught:
        parse_bytes(text, what="KVCACHED_HOST_POOL", whole_bytes=100)
    assert f"KVCACHED_HOST_POOL={text!r} is too large; use at most" in str(caught.value)


def test_a_share_needs_a_whole() -> None:
    with pytest.raises(ConfigError):
        parse_bytes("50%", what="X")


@given(st.integers(0, 2**50))
def test_formatting_keeps_two_decimals(num_bytes: int) -> None:
    text = format_bytes(num_bytes)
    assert parse_bytes(text, what="X") == pytest.approx(num_bytes, rel=6e-3)
