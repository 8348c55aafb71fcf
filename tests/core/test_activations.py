"""Activations are counted in two words of a row, by how long they took."""

from hypothesis import given
from hypothesis import strategies as st

from kvcached_core.ledger.activations import NO_ACTIVATIONS, Activations

MS = 1_000_000
SECOND = 1000 * MS


def words() -> memoryview:
    return memoryview(bytearray(16)).cast("q")


def test_one_is_in_the_first_bucket_whose_bound_it_does_not_exceed() -> None:
    times = (0, 250 * MS, 250 * MS + 1, 500 * MS, SECOND, SECOND + 1)
    total = sum(map(Activations.one, times), NO_ACTIVATIONS)
    assert total.buckets == (2, 2, 1, 1)
    assert total.seconds == 3.0


@given(st.lists(st.integers(0, 10 * SECOND), max_size=20))
def test_the_words_say_the_sum_of_what_was_written(times: list[int]) -> None:
    row, total = words(), NO_ACTIVATIONS
    for nanoseconds in times:
        one = Activations.one(nanoseconds)
        one.write(row)
        total += one
    assert Activations.read(row) == total
    assert total.num == len(times)


@given(st.integers(0, 3))
def test_a_count_that_is_full_begins_again_and_touches_no_other(number: int) -> None:
    row = words()
    one = Activations(tuple(int(index == number) for index in range(4)))
    full = (1 << 21) - 1
    Activations((full,) * 4, 7).write(row)
    one.write(row)
    assert Activations.read(row) == Activations(
        tuple(0 if index == number else full for index in range(4)), 7
    )
