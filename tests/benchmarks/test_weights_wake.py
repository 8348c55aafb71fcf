"""What vLLM's own sleep mode is measured by, beside ours."""

from types import SimpleNamespace
from typing import Any

import pytest
import weights_wake


def test_a_wake_of_sleep_mode_is_measured_to_the_first_token_as_ours_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    took = {"/sleep?level=1": 3.0, "/wake_up": 2.0}

    def post(path: str) -> Any:
        now[0] += took[path]
        return SimpleNamespace(raise_for_status=lambda: None)

    def first_token_seconds(_name: str) -> float:
        now[0] += 0.5 + 0.25  # and the tokens behind the first
        return 0.5

    monkeypatch.setattr(weights_wake, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    run: Any = SimpleNamespace(
        tiny=False,
        servers={weights_wake.VANILLA: SimpleNamespace(post=post)},
        ask=first_token_seconds,
        first_token_seconds=first_token_seconds,
    )
    found = weights_wake.vanilla(run, 1)
    num = weights_wake.NUM_SLEEPS_OF_VANILLA
    assert found["sleep_seconds"] == [3.0] * num
    assert found["wake_to_first_token_seconds"] == [2.5] * num
    assert found["wake_to_last_token_seconds"] == [2.75] * num
