"""With what the benchmark of vLLM's servers compares each of them."""

from typing import Any

import pytest
from vllm_overhead import FIGURES, summary

pytestmark = pytest.mark.vllm


def test_figures_are_ratios_to_the_first_server_named() -> None:
    keep, other = (dict.fromkeys(FIGURES, value) for value in (4.0, 5.0))
    rounds = [{"elastic": keep, "yield": other}, {"elastic": keep, "yield": keep}]
    found = summary(rounds, ["elastic", "yield"])
    assert list(found["ratios"]) == ["yield"]
    assert found["ratios"]["yield"]["mean_tpot_ms"] == [1.25, 1.0]
    assert found["median_ratio"]["yield"]["mean_tpot_ms"] == 1.125


def rounds_of(values: dict[str, list[float]], completed: int = 500) -> list[dict[str, Any]]:
    """Return rounds in which all of a server's figures have these values, one a round."""
    return [
        {
            name: dict.fromkeys(FIGURES, found) | {"completed": completed}
            for name, found in of.items()
        }
        for of in [
            dict(zip(values, each, strict=True)) for each in zip(*values.values(), strict=True)
        ]
    ]


def test_a_difference_is_told_where_it_is_outside_of_what_the_control_shows() -> None:
    names = ["vanilla", "elastic", "control"]
    control = [9.8, 10.5, 10.6, 10.0, 10.5]
    noisy = {"vanilla": [10.0] * 5, "elastic": [10.4] * 5, "control": control}
    said = summary(rounds_of(noisy), names)["said"]["elastic"]
    assert set(said.values()) == {"not told apart"}
    calm = noisy | {"control": [10.0, 9.9, 10.1, 10.0, 10.0]}
    said = summary(rounds_of(calm), names)["said"]["elastic"]
    assert (said["mean_tpot_ms"], said["output_throughput"]) == ("worse", "better")


def test_a_99th_percentile_of_few_requests_says_nothing() -> None:
    values = {"vanilla": [10.0] * 5, "elastic": [20.0] * 5}
    said = summary(rounds_of(values, completed=199), list(values))["said"]["elastic"]
    assert said["p99_ttft_ms"] == "needs 1,000 requests, there were 995"
    assert said["mean_ttft_ms"] == "worse"
    found = summary(rounds_of(values, completed=200), list(values))
    assert found["said"]["elastic"]["p99_ttft_ms"] == "worse"
    assert found["intervals"]["elastic"]["mean_ttft_ms"] == [2.0, 2.0]


def test_few_rounds_and_lost_requests_say_nothing() -> None:
    values = {"vanilla": [10.0] * 4, "elastic": [20.0] * 4}
    said = summary(rounds_of(values), list(values))["said"]["elastic"]
    assert set(said.values()) == {"needs 5 rounds or starts, there were 4"}
    rounds = rounds_of({name: [*found, found[0]] for name, found in values.items()})
    assert summary(rounds, list(values))["said"]["elastic"]["mean_ttft_ms"] == "worse"
    rounds[2]["vanilla"]["failed"] = 3
    said = summary(rounds, list(values))["said"]["elastic"]
    assert set(said.values()) == {"3 requests failed"}


def test_what_is_alike_in_all_rounds_of_a_start_counts_once() -> None:
    of_starts = [10.4, 9.8, 10.3, 9.8, 10.1]
    values = {"vanilla": [10.0] * 30, "elastic": [value for value in of_starts for _ in range(6)]}
    rounds = rounds_of(values)
    for number, each in enumerate(rounds):
        each["start"] = number // 6
    found = summary(rounds, list(values))
    assert found["median_ratio"]["elastic"]["mean_tpot_ms"] == pytest.approx(1.01)
    assert found["intervals"]["elastic"]["mean_tpot_ms"] == pytest.approx([0.98, 1.04])
    assert found["said"]["elastic"]["mean_tpot_ms"] == "not told apart"
    of_first = summary(rounds[:6], list(values))
    assert of_first["intervals"]["elastic"]["mean_tpot_ms"] == pytest.approx([1.04, 1.04])
    assert of_first["said"]["elastic"]["mean_tpot_ms"] == "worse"
