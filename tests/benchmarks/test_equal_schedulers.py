"""Two equally busy schedulers: what they are asked, and how much of it they answer."""

from itertools import islice
from pathlib import Path

import pytest
from helpers.benchmark_scripts import recorded_by
from parts.equal_asks import LEAST_IN, MOST_IN, NUM_OUT, NUM_SHARED, OUT_WHEN_BROKEN_OFF, asks


def test_a_client_asks_the_same_each_time_and_another_one_something_else() -> None:
    first = list(islice(asks("left", 0), 20))
    assert first == list(islice(asks("left", 0), 20))
    assert first != list(islice(asks("left", 1), 20))
    assert first != list(islice(asks("right", 0), 20))


def test_prompts_are_of_all_lengths_some_begin_alike_and_some_are_broken_off() -> None:
    found = [ask for client in range(8) for ask in islice(asks("left", client), 100)]
    lengths = [len(ask.prompt) for ask in found]
    assert LEAST_IN <= min(lengths) < LEAST_IN + 100
    assert MOST_IN - 100 < max(lengths) <= MOST_IN
    begins = [tuple(ask.prompt[:40]) for ask in found]
    shared = sum(begins.count(begin) > 1 for begin in begins) / len(begins)
    assert 0.5 < shared < 0.7
    long = {tuple(ask.prompt[:NUM_SHARED]) for ask in found if len(ask.prompt) >= NUM_SHARED}
    assert len(long) > 2  # not all of them begin alike
    broken_off = [ask for ask in found if ask.num_wanted == OUT_WHEN_BROKEN_OFF]
    assert 0.04 < len(broken_off) / len(found) < 0.12
    assert {ask.num_wanted for ask in found} == {OUT_WHEN_BROKEN_OFF, NUM_OUT}


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.every_release
def test_two_equal_schedulers_on_one_pool_answer_as_much_as_with_half_of_it_each(
    tmp_path: Path,
) -> None:
    """In virtual time; without the rule of equals they answer far less."""
    found = recorded_by("equal_schedulers.py", tmp_path, "--seconds", "20")
    assert found["vanilla"]["answers"] > 100
    assert found["ratio"] >= 0.97
    assert min(found["elastic"]["answers_of_each"]) >= 0.8 * max(
        found["elastic"]["answers_of_each"]
    )
