"""Who goes first to engines that share devices, so that most requests make their goals.

Moore and Hodgson's rule: take requests by deadline, and whenever the work passes a deadline, put
off the one that takes longest. No order lets more of them be in time. Who is put off is late and
goes behind the others; nobody is dropped, and whoever has waited half of what it may goes first.
"""

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from operator import attrgetter, not_
from types import MappingProxyType
from typing import Generic, NamedTuple, TypeVar

CHUNK_TOKENS = 2_048
MAX_PREFILL_TOKENS = 2 * CHUNK_TOKENS  # one that is read and one behind it: no engine idles
LEAST_STALL_SECONDS = 1.0
STALL_FACTOR = 4.0
BY_ARRIVAL = attrgetter("arrival")
BY_DEADLINE = attrgetter("deadline")


@dataclass(eq=False, slots=True)
class Waiting:
    """A request that waits, times in the loop's seconds; nothing of this changes while it does.

    What changes, for all requests to a model at once, is in the model's `Pace`. So a line passes
    on what it has, however often it asks for an order.

    Attributes:
        model: The model that reads its prompt.
        arrival: When it came.
        deadline: When its first token is late by its class's goal; None for no goal.
        work: What reading its prompt takes, as its model's pace counts it.
        overdue_at: From when on it goes before whoever came later.
    """

    model: str
    arrival: float
    deadline: float | None
    work: float
    overdue_at: float = math.inf


class Pace(NamedTuple):
    """How soon a model's requests get their first tokens, once it is their turn.

    Attributes:
        per_second: What work it does a second, in whatever unit; infinite where nobody knows.
        start_seconds: What is left of its start; 0 where it is up.
        first: The first that waits for that start. It counts for this one alone.
    """

    per_second: float = 1.0
    start_seconds: float = 0.0
    first: Waiting | None = None

    def needed_seconds(self, one: Waiting) -> float:
        """Return what a request takes until its first token, once it is its turn."""
        seconds = one.work / self.per_second
        return seconds + self.start_seconds if one is self.first else seconds


EVEN = Pace()
NO_PACES: Mapping[str, Pace] = MappingProxyType({})
W = TypeVar("W", bound=Waiting)


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
class Order(Generic[W]):
    """In which order requests go to their engines.

    Attributes:
        kept: The overdue, then those that make their goals, then those without one.
        late: Those that cannot make their goal, in the order in which they came.
        now: When this was decided.
        paces: How fast each model was.
    """

    kept: tuple[W, ...]
    late: tuple[W, ...]
    now: float
    paces: Mapping[str, Pace] = field(repr=False)
    _late: frozenset[int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_late", frozenset(map(id, self.late)))

    def reason(self, one: W) -> str:
        """Say why a request goes where it goes."""
        if one.overdue_at <= self.now:
            waited = self.now - one.arrival
            return f"has waited {waited:.1f} s, half of what it may: it goes by its arrival"
        if one.deadline is None:
            return "has no goal: it goes behind those that have one, by its arrival"
        left = one.deadline - self.now
        if id(one) in self._late:
            needed = self.paces.get(one.model, EVEN).needed_seconds(one)
            return (
                f"needs {needed:.2f} s of the {left:.2f} s to its goal, and without it "
                "more of the others make theirs: it goes behind them"
            )
        return f"makes its goal in {left:.2f} s: it goes by that"


def order(waiting: Iterable[W], now: float, paces: Mapping[str, Pace] = NO_PACES) -> Order[W]:
    """Return the order for requests whose engines share devices, in O(n log n).

    Without any goal it is the order in which they came.

    Args:
        waiting: All that wait.
        now: As all times, in the loop's seconds.
        paces: How fast each model is; where it has none, work is counted in seconds.
    """
    overdue: list[W] = []
    aims: list[W] = []
    aimless: list[W] = []
    for one in sorted(waiting, key=BY_ARRIVAL):
        if one.overdue_at <= now:
            overdue.append(one)
        else:
            (aimless if one.deadline is None else aims).append(one)
    aims.sort(key=BY_DEADLINE)
    begin = now + sum(paces.get(one.model, EVEN).needed_seconds(one) for one in overdue)
    are_late = _are_late(aims, begin, paces)
    kept = (*overdue, *compress(aims, map(not_, are_late)), *aimless)
    return Order(kept, tuple(sorted(compress(aims, are_late), key=BY_ARRIVAL)), now, paces)


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


def _are_late(aims: Sequence[W], begin: float, paces: Mapping[str, Pace]) -> list[bool]:
    """Say of each of `aims`, sorted by deadline, whether it is late: as few as there can be.

    What passes a deadline puts off the longest so far, and of equals the one that came last.
    """
    are_late = [False] * len(aims)
    heap: list[tuple[float, float, int]] = []  # the longest first
    end = begin
    for index, one in enumerate(aims):
        needed = paces.get(one.model, EVEN).needed_seconds(one)
        entry = (-needed, -one.arrival, index)
        if end + needed <= (one.deadline or 0.0):
            heapq.heappush(heap, entry)
            end += needed
        else:
            longest, _, worst = heapq.heappushpop(heap, entry)
            end += needed + longest
            are_late[worst] = True
    return are_late
