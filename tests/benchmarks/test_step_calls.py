"""What is said of the calls that two engines made."""

import sys

import pytest
from step_calls import Calls, compare


def test_calls_are_those_of_a_step_and_what_differs_most_comes_first() -> None:
    vanilla = {"steps": 10, "calls": {"a:f": 50, "C:len": 20}}
    elastic = {"steps": 5, "calls": {"a:f": 25, "C:len": 5, "b:g": 15}}
    found = compare(vanilla, elastic)
    assert found["calls_of_a_step"] == {"vanilla": 7.0, "elastic": 9.0}
    assert found["ratio"] == pytest.approx(9 / 7)
    assert found["differ_most"] == {"b:g": 3.0, "C:len": -1.0, "a:f": 0.0}
    assert list(found["differ_most"]) == ["b:g", "C:len", "a:f"]


def test_calls_of_python_and_of_c_are_counted_by_name_while_the_block_runs() -> None:
    def double(number: int) -> int:
        return number * 2

    def profile(*_: object) -> None:
        pass

    sys.setprofile(profile)
    calls = Calls()
    double(1)
    with calls:
        double(len("ab"))
        double(3)
    after = sys.getprofile()
    sys.setprofile(None)
    assert after is profile
    assert calls.counts[f"{__name__}:{double.__qualname__}"] == 2
    assert calls.counts["C:len"] == 1
