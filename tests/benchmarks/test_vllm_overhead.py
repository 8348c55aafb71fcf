"""With what the benchmark of vLLM's servers compares each of them."""

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
