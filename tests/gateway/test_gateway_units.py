"""Durations and times of the week, as people write them."""

from contextlib import suppress
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcached_gateway.settings.durations import parse_seconds
from kvcached_gateway.settings.units import parse_warm_time


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("45s", 45),
        ("30m", 1800),
        ("2h", 7200),
        ("1d", 86400),
        ("250ms", 0.25),
        ("1.5s", 1.5),
        ("7", 7),
    ],
)
def test_a_duration_is_seconds(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "-1s", "1w", "1h30m", "soon", "1e3", "٣s"])
def test_what_is_no_duration_is_refused_with_what_is(text: str) -> None:
    with pytest.raises(ValueError, match="write a time such as"):
        parse_seconds(text)


@given(st.text())
def test_any_text_is_a_duration_or_a_value_error(text: str) -> None:
    with suppress(ValueError):
        assert parse_seconds(text) >= 0


@pytest.mark.parametrize(
    ("text", "days"),
    [
        ("mon-fri 07:50", {0, 1, 2, 3, 4}),
        ("sat,sun 7:50", {5, 6}),
        ("fri-mon 23:59 UTC", {4, 5, 6, 0}),
        ("daily 00:00 Europe/Berlin", set(range(7))),
        ("Tue 1:00", {1}),
    ],
)
def test_a_time_of_the_week_has_its_days(text: str, days: set[int]) -> None:
    assert parse_warm_time(text).days == days


def test_a_time_of_the_week_is_one_of_its_zone() -> None:
    time = parse_warm_time("mon-fri 07:50 Europe/Berlin")
    assert time.is_at(datetime(2026, 11, 30, 6, 50, 30, tzinfo=UTC))
    assert time.is_at(datetime(2026, 6, 1, 5, 50, tzinfo=UTC))  # in summer
    assert not time.is_at(datetime(2026, 11, 30, 6, 51, tzinfo=UTC))
    assert not time.is_at(datetime(2026, 11, 29, 6, 50, tzinfo=UTC))  # a Sunday


@pytest.mark.parametrize(
    "text",
    [
        "",
        "07:50",
        "mon",
        "mon 24:00",
        "mon 7:60",
        "monday 7:00",
        "mon- 7:00",
        "mon 7:00 Mars/Base",
        "mon 7:00 ../../etc/passwd",
        "mon 7:00 UTC x",
    ],
)
def test_what_is_no_time_of_the_week_is_refused_with_what_is(text: str) -> None:
    with pytest.raises(ValueError, match="write days, a time and a zone"):
        parse_warm_time(text)
