"""The fastest steps full of tokens say how fast an engine computes prompts."""

import pytest

from kvcached_core.weights.prompt_speed import PromptSpeed


def test_the_fastest_full_steps_count_and_no_answers_or_pauses() -> None:
    speed, now = PromptSpeed(), 100.0

    def step(num_tokens: int, seconds: float) -> float:
        nonlocal now
        now += seconds
        speed.computed(num_tokens, now)
        return speed.tokens_per_second

    assert step(64, 0.01) == 0
    assert step(2000, 50.0) == pytest.approx(40)  # it was idle before
    step(2000, 0.1)
    assert step(2000, 0.1) == pytest.approx(20_000)
    for _ in range(10):
        step(600, 0.02)  # steps that are too short to say something each
    assert speed.tokens_per_second == pytest.approx(30_000)
    step(64, 0.0001)  # answers
    assert step(511, 0.0001) == pytest.approx(30_000)
    assert step(600, 0.0001) == pytest.approx(30_000)
    assert step(600, 0.06) == pytest.approx(30_000)
