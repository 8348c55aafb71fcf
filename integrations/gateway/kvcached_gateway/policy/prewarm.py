"""Which models come up before somebody asks for them, into memory that nobody has to leave.

Three causes: the file's times (`warm_at`), the file's companions (`warm_with`), and a habit: where
requests for one model followed those for another within half a minute in at least half of
twenty cases or more, the second one wakes with the first. A model whose habit comes to nothing
too often has none for a day.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple

from kvcached_gateway.settings.units import WarmTime

TOGETHER_SECONDS = 30.0
LEAST_SHARE = 0.5
LEAST_EVENTS = 20
LEAST_HIT_SHARE = 0.3
LEAST_GUESSES = 5  # before hits are compared with that share
OFF_SECONDS = 86_400.0


class Prewarmable(NamedTuple):
    """A model, and what its coming up takes.

    Attributes:
        id: Its name.
        is_up: Whether its engine is there with all its weights.
        is_yielded: Whether the engine is there without them.
        needed_bytes: What its coming up takes, by place: a device, or the host's memory.
        warm_at: Times of the week.
        warm_with: The models that it comes up with.
        up_since: When it last began to come up; None where it never did.
        down_since: When it last went down, or yielded; None where it never did.
    """

    id: str
    is_up: bool
    is_yielded: bool
    needed_bytes: Mapping[str, int]
    warm_at: tuple[WarmTime, ...] = ()
    warm_with: tuple[str, ...] = ()
    up_since: float | None = None
    down_since: float | None = None


@dataclass(frozen=True)
class Wish:
    """A model that shall come up.

    Attributes:
        model: Its name.
        reason: Why.
        is_guess: Whether only habit speaks for it; whether it was right is counted.
    """

    model: str
    reason: str
    is_guess: bool = False


@dataclass(frozen=True)
class Wishes:
    """What shall come up.

    Attributes:
        granted: Those for which there is room beside everybody.
        reasons: Why, for each of these, and for each that stays down for want of room.
    """

    granted: tuple[Wish, ...]
    reasons: Mapping[str, str]


@dataclass
class Habits:
    """Which models are asked one soon after the other, and whether guesses by that came true.

    An event of a model is a request after half a minute without one.
    """

    _last: dict[str, float] = field(default_factory=dict)
    _began: dict[str, float] = field(default_factory=dict)
    _events: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    _followed: dict[str, dict[str, int]] = field(default_factory=dict)  # a model, and whom
    _open: set[str] = field(default_factory=set)
    _hits: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))
    _off_until: dict[str, float] = field(default_factory=dict)

    def arrived(self, model: str, now: float) -> None:
        """Take notice of a request."""
        last = self._last.get(model)
        self._last[model] = now
        if model in self._open:
            self._judge(model, is_hit=True, now=now)
        if last is not None and now - last < TOGETHER_SECONDS:
            return
        if model in self._began:
            self._events[model] += 1
        self._began[model] = now
        followed = self._followed.setdefault(model, {})
        for other, began in self._began.items():
            if other != model and now - began <= TOGETHER_SECONDS:
                followed[other] = followed.get(other, 0) + 1

    def woken(self, wish: Wish) -> None:
        """Remember that a guess was followed: a request makes it a hit."""
        if wish.is_guess:
            self._open.add(wish.model)

    def went_down(self, model: str, now: float) -> None:
        """Take notice that a model went down, or yielded: a guess without a request was wrong."""
        if model in self._open:
            self._judge(model, is_hit=False, now=now)

    def share(self, first: str, second: str) -> float:
        """Return in which part of its events, without the last one, another model followed."""
        num_events = self._events.get(first, 0)
        if num_events < LEAST_EVENTS:
            return 0.0
        return min(self._followed.get(second, {}).get(first, 0) / num_events, 1.0)

    def leading(self, now: float) -> dict[str, int]:
        """Return the models that have an event just now, and how many each had before.

        Those that had too few to tell are not among them.
        """
        return {
            name: num_events
            for name, began in self._began.items()
            if now - began <= TOGETHER_SECONDS
            and (num_events := self._events.get(name, 0)) >= LEAST_EVENTS
        }

    def leader(self, model: str, leading: Mapping[str, int], now: float) -> str | None:
        """Return which of `leading` usually brings an event of this model, too."""
        if now < self._off_until.get(model, now):
            return None
        followed = self._followed.get(model, {})
        best, leader = 0.0, ""
        for name, num_events in leading.items():
            share = followed.get(name, 0) / num_events
            if share >= LEAST_SHARE:
                share = min(share, 1.0)
                if share > best or (share == best and name > leader):
                    best, leader = share, name
        return leader or None

    def num_hits(self, model: str) -> tuple[int, int]:
        """Return how many guesses about a model came true, of how many."""
        hits = self._hits.get(model, [])
        return sum(hits), len(hits)

    def _judge(self, model: str, *, is_hit: bool, now: float) -> None:
        self._open.discard(model)
        hits = self._hits[model]
        hits.append(is_hit)
        if len(hits) >= LEAST_GUESSES and sum(hits) < LEAST_HIT_SHARE * len(hits):
            self._off_until[model] = now + OFF_SECONDS
            hits.clear()


def wishes(
    now: float,
    moment: datetime,
    models: Sequence[Prewarmable],
    habits: Habits,
    free_bytes: Mapping[str, int],
) -> Wishes:
    """Return which models shall come up now, beside everybody that is.

    Args:
        now: The loop's seconds, as all times of `models`.
        moment: The same as a time of the week, with its zone.
        models: Every model of the file.
        habits: Who is asked together.
        free_bytes: What nobody uses or was promised, by place.
    """
    up_since = {model.id: model.up_since for model in models if model.up_since is not None}
    leading = habits.leading(now)
    left = dict(free_bytes)
    granted = []
    reasons = {}
    for model in models:
        wish = None if model.is_up else _wish(now, moment, model, habits, leading, up_since)
        if wish is None:
            continue
        reasons[model.id] = wish.reason
        short = sorted(
            place for place, need in model.needed_bytes.items() if need > left.get(place, 0)
        )
        if short:
            reasons[model.id] += f"; it stays down: on {', '.join(short)} others would have to go"
            continue
        granted.append(wish)
        for place, need in model.needed_bytes.items():
            left[place] = left.get(place, 0) - need
    return Wishes(tuple(granted), reasons)


def _wish(
    now: float,
    moment: datetime,
    model: Prewarmable,
    habits: Habits,
    leading: Mapping[str, int],
    up_since: Mapping[str, float],
) -> Wish | None:
    """Return why a model that is not up should be."""
    if any(time.is_at(moment) for time in model.warm_at):
        return Wish(model.id, f"comes up: its time, {moment:%H:%M}, is in warm_at")
    if first := _companion(model, up_since):
        return Wish(model.id, f"comes up with {first!r}, as its warm_with says")
    if not model.is_yielded or (leader := habits.leader(model.id, leading, now)) is None:
        return None
    share = habits.share(leader, model.id)
    reason = f"wakes with {leader!r}: in {share:.0%} of the cases its requests followed that one's"
    return Wish(model.id, reason, is_guess=True)


def _companion(model: Prewarmable, up_since: Mapping[str, float]) -> str | None:
    """Return a companion that came up after the model went down."""
    found: Iterable[str] = (
        name
        for name in model.warm_with
        if name in up_since and (model.down_since is None or up_since[name] >= model.down_since)
    )
    return next(iter(found), None)
