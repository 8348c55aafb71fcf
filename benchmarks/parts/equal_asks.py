"""What clients ask of two equal servers: prompts of mixed lengths, of which some begin alike."""

import random
from collections.abc import Iterator

from parts.virtual_scheduler import Ask

SIDES = ("left", "right")
LEAST_IN, MOST_IN, NUM_OUT, OUT_WHEN_BROKEN_OFF = 50, 1900, 24, 4
# Of a server's requests so many begin alike, in one of these ways; so many are broken off.
SHARING_SHARE, NUM_BEGINNINGS, NUM_SHARED = 0.6, 2, 900
BROKEN_OFF_SHARE = 0.08
VOCABULARY = range(3, 500)


def asks(side: str, client: int) -> Iterator[Ask]:
    """Yield the requests of a client, the same ones each time."""
    shared = random.Random(side)
    beginnings = [shared.choices(VOCABULARY, k=NUM_SHARED) for _ in range(NUM_BEGINNINGS)]
    draws = random.Random(f"{side} {client}")
    while True:
        num_in = draws.randint(LEAST_IN, MOST_IN)
        begins = draws.choice(beginnings) if draws.random() < SHARING_SHARE else []
        prompt = [*begins, *draws.choices(VOCABULARY, k=MOST_IN)][:num_in]
        is_whole = draws.random() >= BROKEN_OFF_SHARE
        yield Ask(prompt, NUM_OUT if is_whole else OUT_WHEN_BROKEN_OFF, is_whole, client)


class Clients:
    """The clients of a side, each of which asks when it has its answer.

    Args:
        side: Which one.
        num: How many there are.
    """

    def __init__(self, side: str, num: int) -> None:
        self._asks = [asks(side, client) for client in range(num)]
        self._due = [next(each) for each in self._asks]

    def due(self, _seconds: float) -> list[Ask]:
        """See `Source`."""
        found, self._due = self._due, []
        return found

    def began(self, ask: Ask, seconds: float) -> None:
        """See `Source`: nobody here measures it."""

    def ended(self, ask: Ask, _seconds: float) -> None:
        """See `Source`."""
        self._due.append(next(self._asks[ask.client]))
