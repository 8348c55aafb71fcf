"""Which requests `gateway_gpu` sends, and when: the same for the same seed."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

FIRST_WORD, NUM_WORDS = 3, 500  # token ids that every tokenizer of ours has
BURST_EVERY_SECONDS, BURST_SECONDS = 2.0, 2.6
NUM_IN_BURST = 20
BESIDE_SECONDS = 60.0  # right answers, copies of weights, and the end of the engines
ANSWER_SECONDS = 1.2  # what the last answer of a burst takes before the next but one begins

# What of the device the strict model of `rivals` takes. With 0.7, the first run on an H200 had 76 %
# of its requests in time without classes, which leaves no room for 25 points. A replay with the
# pure policy says the same as that run, for both models and both ways, if a device reads 1.22 times
# what the gauge says, because it reads prompts of two engines at once. There 0.85 leaves half of
# them in time without classes, and between a quarter and two thirds for a device of 1.12 to 1.32
# times the gauge; with classes all of both models. A test replays it.
STRICT_SHARE, LOOSE_SHARE = 0.85, 0.25


@dataclass(frozen=True)
class Due:
    """A request of a schedule.

    Attributes:
        at_seconds: When it is sent, from the beginning.
        model: The model's name.
        prompt: Its tokens.
        num_tokens: How many tokens it asks for.
    """

    at_seconds: float
    model: str
    prompt: tuple[int, ...]
    num_tokens: int


def prompt(seed: int, num_tokens: int) -> tuple[int, ...]:
    """Return random words."""
    source = random.Random(seed)
    return tuple(source.randrange(FIRST_WORD, NUM_WORDS) for _ in range(num_tokens))


def bursts(
    models: Sequence[str],
    prompts: Sequence[tuple[int, ...]],
    *,
    num_requests: int,
    num_in_burst: int = NUM_IN_BURST,
    num_tokens: int,
    seed: int = 1,
) -> list[Due]:
    """Return bursts at random models, of which at most two overlap.

    Args:
        models: Three at least, so that a burst never goes on with a model that still has one.
        prompts: What is asked, in turn.
        num_requests: How many requests there are in all.
        num_in_burst: How many make a burst: a quarter of it at once, the rest at random.
        num_tokens: What each asks for.
        seed: Of models and times.
    """
    source = random.Random(seed)
    found: list[Due] = []
    before = ""
    for number in range(-(-num_requests // num_in_burst)):
        begin = number * BURST_EVERY_SECONDS
        model = before = source.choice([name for name in models if name != before])
        for index in range(num_in_burst):
            later = source.uniform(0, BURST_SECONDS) if index >= num_in_burst // 4 else 0.0
            found.append(Due(begin + later, model, prompts[len(found) % len(prompts)], num_tokens))
    return sorted(found[:num_requests], key=lambda due: due.at_seconds)


def start_seconds(num_requests: int, limit_seconds: float, end_seconds: int | None) -> float:
    """Return how long starts are waited for: where there is an end, the bursts shall fit, too."""
    if end_seconds is None:
        return limit_seconds
    bursts_seconds = num_requests / NUM_IN_BURST * BURST_EVERY_SECONDS
    return max(min(limit_seconds, end_seconds - bursts_seconds - BESIDE_SECONDS), 0.0)


def rivals(
    strict: str,
    loose: str,
    *,
    tokens_per_second: float,
    seconds: float,
    strict_tokens: int,
    loose_tokens: int,
    strict_share: float = STRICT_SHARE,
    loose_share: float = LOOSE_SHARE,
    num_tokens: int = 4,
    seed: int = 2,
) -> list[Due]:
    """Return a steady load for one model and, a second later, a heap of work for the other.

    Args:
        strict: The model with the steady load: arrivals as of a Poisson process.
        loose: The model that gets all of its requests at once.
        tokens_per_second: What the device reads.
        seconds: How long the load takes.
        strict_tokens: Tokens of a prompt of the one.
        loose_tokens: Tokens of a prompt of the other.
        strict_share: What of the device the one takes.
        loose_share: What of the device the other would take over all that time.
        num_tokens: What each asks for.
        seed: Of times and prompts.
    """
    source = random.Random(seed)
    found: list[Due] = []
    rate = strict_share * tokens_per_second / strict_tokens
    at = source.expovariate(rate)
    while at < seconds:
        found.append(Due(at, strict, prompt(len(found), strict_tokens), num_tokens))
        at += source.expovariate(rate)
    num_loose = max(round(loose_share * tokens_per_second * seconds / loose_tokens), 1)
    found += [
        Due(1.0, loose, prompt(10_000 + number, loose_tokens), num_tokens)
        for number in range(num_loose)
    ]
    return sorted(found, key=lambda due: due.at_seconds)


def num_overlapping(schedule: Sequence[Due]) -> int:
    """Return how many models at most have requests that were sent within an answer's time."""
    return max(
        len(
            {
                due.model
                for due in schedule
                if now.at_seconds - ANSWER_SECONDS <= due.at_seconds <= now.at_seconds
            }
        )
        for now in schedule
    )
