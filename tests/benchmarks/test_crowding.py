"""What was in use when a request came, and how soon it was answered then."""

import pytest
from multi_model.client import Record
from multi_model.crowding import STEP_BYTES, by_need, needed_bytes

from kvcached_core.units import GIB

WEIGHTS = [2 * GIB, 4 * GIB, 8 * GIB]


def asked(model: int, at_seconds: float, seconds: float, ttft_seconds: float = 0.1) -> Record:
    """Return a request that a client was late with by half a second, answered in so many."""
    return Record(
        model,
        at_seconds - 0.5,
        1,
        1,
        late_seconds=0.5,
        ttft_seconds=ttft_seconds,
        last_seconds=seconds,
    )


def test_a_model_is_in_use_from_a_request_to_its_last_token_and_counts_once() -> None:
    records = [asked(0, 1.0, 4.0), asked(1, 2.0, 1.0), asked(0, 2.5, 1.0), asked(2, 3.0, 1.0)]
    assert needed_bytes(records, WEIGHTS) == [2 * GIB, 6 * GIB, 6 * GIB, 10 * GIB]


def test_a_request_that_got_no_token_needs_its_own_model_alone() -> None:
    failed = Record(1, 1.0, 1, 1, error="refused")
    assert needed_bytes([failed, asked(0, 1.5, 1.0)], WEIGHTS) == [4 * GIB, 2 * GIB]


def test_first_tokens_are_told_by_what_was_in_use() -> None:
    early = [asked(0, float(second), 0.5, 0.1) for second in range(9)]
    late = [asked(2, 20.0, 5.0, 0.2), asked(1, 21.0, 1.0, 3.0), asked(0, 21.5, 1.0, 2.0)]
    few, more, all_of_them = by_need([*early, *late, Record(1, 0.0, 1, 1)], WEIGHTS)
    assert [line["up_to_bytes"] // STEP_BYTES for line in (few, more, all_of_them)] == [1, 2, 3]
    assert [line["num"] for line in (few, more, all_of_them)] == [9, 10, 12]
    assert [line["longest_seconds"] for line in (few, more, all_of_them)] == [0.1, 0.2, 3.0]
    assert few["p99_seconds"] == pytest.approx(0.1)


def test_nothing_is_told_of_nothing() -> None:
    assert by_need([], WEIGHTS) == []
