"""What admission is for, in simulated time: no figure of these is a result."""

import random

import pytest
from helpers.gateway_replay import Asked, replay

STRICT_SECONDS, LOOSE_SECONDS = 1.0, 20.0
NUM_SECONDS = 60


def burst(model: str, at: float, number: int, tokens: float, goal: float) -> list[Asked]:
    return [Asked(at + 0.001 * index, model, tokens, goal) for index in range(number)]


def one_model() -> list[Asked]:
    """A steady trickle of strict requests, and bursts of loose ones, at one engine."""
    random_numbers = random.Random(7)
    asked, now = [], 0.0
    while now < NUM_SECONDS:
        asked.append(Asked(now, "a", 500, STRICT_SECONDS))
        now += random_numbers.expovariate(4.0)
    for at in range(5, NUM_SECONDS, 20):
        asked += burst("a", at, 80, 2_000, LOOSE_SECONDS)
    return asked


def two_models() -> list[Asked]:
    """Bursts of a strict model beside bursts of a loose one, on one device."""
    asked = []
    for at in range(5, NUM_SECONDS, 20):
        asked += burst("a", at + 0.5, 36, 500, STRICT_SECONDS)
        asked += burst("b", at, 80, 2_000, LOOSE_SECONDS)
    return asked


def attainment(asked: list[Asked], goal: float) -> float:
    """Return the percentage of a class that is in time."""
    of_class = [one for one in asked if one.ttft_seconds == goal]
    return 100 * sum(one.is_in_time for one in of_class) / len(of_class)


@pytest.mark.parametrize("schedule", [one_model, two_models])
def test_under_bursts_more_of_the_strict_are_in_time_and_hardly_fewer_of_the_loose(
    schedule: object,
) -> None:
    without, with_admission = schedule(), schedule()  # type: ignore[operator]
    replay(without, has_admission=False)
    replay(with_admission, has_admission=True)
    for asked in (without, with_admission):
        assert all(one.answered_at is not None for one in asked)
    gain = attainment(with_admission, STRICT_SECONDS) - attainment(without, STRICT_SECONDS)
    loss = attainment(without, LOOSE_SECONDS) - attainment(with_admission, LOOSE_SECONDS)
    assert gain >= 25
    assert loss <= 2


def test_without_bursts_admission_changes_nothing() -> None:
    answers = []
    for has_admission in (False, True):
        asked = [Asked(float(second), "a", 500, STRICT_SECONDS) for second in range(30)]
        replay(asked, has_admission=has_admission)
        answers.append([one.answered_at for one in asked])
    assert answers[0] == answers[1]
