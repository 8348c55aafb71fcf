"""Which requests `gateway_gpu` sends, and when: the same for the same seed."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

FIRST_WORD, NUM_WORDS = 3, 500  # token ids that every tokenizer of ours has
BURST_EVERY_SECONDS, BURST_SECONDS = 2.0, 2.6
ANSWER_SECONDS = 1.2  # what the last answer of a burst takes before the next but one begins


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
    num_in_burst: int,
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


def rivals(
    strict: str,
    loose: str,
    *,
    tokens_per_second: float,
    seconds: float,
    strict_tokens: int,
    loose_tokens: int,
    strict_share: float = 0.7,
    loose_share: float = 0.25,
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
