"""What clients ask of two equal servers: prompts of mixed lengths, of which some begin alike."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

SIDES = ("left", "right")
LEAST_IN, MOST_IN, NUM_OUT, OUT_WHEN_BROKEN_OFF = 50, 1900, 24, 4
# Of a server's requests so many begin alike, in one of these ways; so many are broken off.
SHARING_SHARE, NUM_BEGINNINGS, NUM_SHARED = 0.6, 2, 900
BROKEN_OFF_SHARE = 0.08
VOCABULARY = range(3, 500)


@dataclass(frozen=True)
class Ask:
    """A request.

    Attributes:
        prompt: Its tokens.
        num_wanted: After how many parts of the answer its client has enough; `NUM_OUT` is all.
    """

    prompt: list[int]
    num_wanted: int


def asks(side: str, client: int) -> Iterator[Ask]:
    """Yield the requests of a client, the same ones each time."""
    shared = random.Random(side)
    beginnings = [shared.choices(VOCABULARY, k=NUM_SHARED) for _ in range(NUM_BEGINNINGS)]
    draws = random.Random(f"{side} {client}")
    while True:
        num_in = draws.randint(LEAST_IN, MOST_IN)
        begins = draws.choice(beginnings) if draws.random() < SHARING_SHARE else []
        prompt = [*begins, *draws.choices(VOCABULARY, k=MOST_IN)][:num_in]
        is_broken_off = draws.random() < BROKEN_OFF_SHARE
        yield Ask(prompt, OUT_WHEN_BROKEN_OFF if is_broken_off else NUM_OUT)
