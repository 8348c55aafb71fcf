"""Who goes first to engines that share devices, so that most requests make their goals.

Moore and Hodgson's rule: take requests by deadline, and whenever the work passes a deadline, put
off the one that takes longest. No order lets more of them be in time. Who is put off is late and
goes behind the others; nobody is dropped, and whoever has waited half of what it may goes first.
"""

import heapq
import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

CHUNK_TOKENS = 2_048
MAX_PREFILL_TOKENS = 2 * CHUNK_TOKENS  # one that is read and one behind it: no engine idles
LEAST_STALL_SECONDS = 1.0
STALL_FACTOR = 4.0
BY_ARRIVAL = attrgetter("arrival")
BY_DEADLINE = attrgetter("deadline", "arrival")


class Waiting(NamedTuple):
    """A request that waits, times in the loop's seconds.

    Attributes:
        key: What the caller knows it by.
        arrival: When it came.
        deadline: When its first token is late by its class's goal; None for no goal.
        seconds: What reading its prompt takes.
        model: Its model.
        is_first_of_start: Whether it is the first that waits for a model that is not up.
        start_seconds: What is left of that start.
        overdue_at: From when on it goes before whoever came later.
    """

    key: Hashable
    arrival: float
    deadline: float | None
    seconds: float
    model: str
    is_first_of_start: bool = False
    start_seconds: float = 0.0
    overdue_at: float = math.inf

    @property
    def needed_seconds(self) -> float:
        """What it takes until its first token, once it is its turn."""
        return self.seconds + (self.start_seconds if self.is_first_of_start else 0.0)


@dataclass(frozen=True)
class Prompt:
    """A prompt that an engine has, and that had no first byte yet.

    Attributes:
        model: Its model.
        tokens: About how many it has.
        stalls_at: From when on its engine seems to do something else, such as to wait for memory.
    """

    model: str
    tokens: float
    stalls_at: float


@dataclass(frozen=True)
class Order:
    """In which order requests go to their engines.

    Attributes:
        kept: Keys of the overdue, then of those that make their goals, then of those without one.
        late: Keys of those that cannot make their goal, in the order in which they came.
        now: When this was decided.
        waiting: What it was decided about, by key.
    """

    kept: tuple[Hashable, ...]
    late: tuple[Hashable, ...]
    now: float
    waiting: dict[Hashable, Waiting] = field(repr=False)
    _late: frozenset[Hashable] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_late", frozenset(self.late))

    def reason(self, key: Hashable) -> str:
        """Say why a request goes where it goes."""
        one = self.waiting[key]
        if one.overdue_at <= self.now:
            waited = self.now - one.arrival
            return f"has waited {waited:.1f} s, half of what it may: it goes by its arrival"
        if one.deadline is None:
            return "has no goal: it goes behind those that have one, by its arrival"
        left = one.deadline - self.now
        if key in self._late:
            return (
                f"needs {one.needed_seconds:.2f} s of the {left:.2f} s to its goal, and without it "
                "more of the others make theirs: it goes behind them"
            )
        return f"makes its goal in {left:.2f} s: it goes by that"


def order(waiting: Sequence[Waiting], now: float) -> Order:
    """Return the order for requests whose engines share devices, in O(n log n).

    Without any goal it is the order in which they came.
    """
    overdue = sorted((one for one in waiting if one.overdue_at <= now), key=BY_ARRIVAL)
    others = [one for one in waiting if one.overdue_at > now]
    aims = sorted((one for one in others if one.deadline is not None), key=BY_DEADLINE)
    aimless = sorted((one for one in others if one.deadline is None), key=BY_ARRIVAL)
    late = _put_off(aims, now + sum(one.needed_seconds for one in overdue))
    kept = (*overdue, *(one for one in aims if one.key not in late), *aimless)
    return Order(
        tuple(one.key for one in kept),
        tuple(one.key for one in sorted(late.values(), key=BY_ARRIVAL)),
        now,
        {one.key: one for one in waiting},
    )


def stalls_at(now: float, reading_seconds: float) -> float:
    """Return when a prompt that goes out now stops to hold up other models."""
    return now + max(LEAST_STALL_SECONDS, STALL_FACTOR * reading_seconds)


def has_room(model: str, prompts: Iterable[Prompt], now: float) -> bool:
    """Whether one more prompt should go to a model's engine, beside those being read there.

    Its own engine and all engines of the devices together have less than two chunks to read. A
    prompt that stalls counts for its own model alone, so that no model holds up the others.
    """
    own = beside = 0.0
    for prompt in prompts:
        own += prompt.tokens if prompt.model == model else 0.0
        beside += prompt.tokens if prompt.stalls_at > now else 0.0
    return max(own, beside) < MAX_PREFILL_TOKENS


def _put_off(aims: Sequence[Waiting], start: float) -> dict[Hashable, Waiting]:
    """Return those that are late, so that the most of `aims`, sorted by deadline, are not."""
    late: dict[Hashable, Waiting] = {}
    heap: list[tuple[float, float, int]] = []  # the longest first, and of equals the last that came
    end = start
    for index, one in enumerate(aims):
        needed = one.needed_seconds
        heapq.heappush(heap, (-needed, -one.arrival, index))
        end += needed
        if end > (one.deadline or 0.0):
            longest, _, worst = heapq.heappop(heap)
            end += longest
            late[aims[worst].key] = aims[worst]
    return late
