"""Which idle models are stopped so that another one fits: all that it takes, or none.

Greedy-Dual-Size-Frequency. A model is worth `level + frequency * weight * start_seconds / bytes`:
how often it is asked for, what its class counts, what its next start takes, for each byte that its
end gives back. The cheapest go first. `level` is the worth of the last victim before the model was
asked for last, so that what was asked for often, long ago, does not stay for ever. A model that was
stopped soon after its start twice stays longer the next time, and none is stopped so soon that it
could start more often than once in `starts_apart`.
"""

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple, Protocol

from kvcached_core.units import format_bytes

EARLY_SECONDS = 300.0
NUM_EARLY = 2
NUM_LEVELS = 64
MAX_MIN_WARM_SECONDS = 600.0


class Candidate(NamedTuple):
    """A model that is up.

    Attributes:
        id: Its name.
        freed_bytes: What its end gives back, by place: a device, or the host's memory.
        frequency: How often it was asked for, decayed.
        start_seconds: What its next start takes.
        is_busy: Whether it has a lease, or requests that wait.
        is_pinned: Whether it stays in any case.
        idle_seconds: How long it has had no request.
        warm_seconds: How long it has been up.
        begun_seconds: How long ago its engine began to start.
        class_weight: What a request to it counts.
    """

    id: str
    freed_bytes: Mapping[str, int]
    frequency: float
    start_seconds: float
    is_busy: bool
    is_pinned: bool
    idle_seconds: float
    warm_seconds: float
    begun_seconds: float = math.inf
    class_weight: float = 1.0

    def worth(self, places: Iterable[str]) -> float:
        """Return what is lost with it for each byte that it gives back in `places`."""
        num_bytes = sum(self.freed_bytes.get(place, 0) for place in places)
        return self.frequency * self.class_weight * self.start_seconds / max(num_bytes, 1)


@dataclass(frozen=True)
class Aging:
    """What evictions leave for later ones.

    Attributes:
        levels: When one was, and the worth of its dearest victim; the last ones.
        num_early: How often in a row each model was stopped soon after its start.
    """

    levels: tuple[tuple[float, float], ...] = ()
    num_early: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))

    def level_at(self, moment: float) -> float:
        """Return the worth of the last victim before a moment, 0 where there was none."""
        index = bisect_right(self.levels, moment, key=lambda level: level[0])
        return self.levels[index - 1][1] if index else 0.0

    def min_warm_seconds(self, model: str, base_seconds: float) -> float:
        """Return how long a model stays up at least: doubled for each two early ends."""
        doubled: float = base_seconds * 2 ** (self.num_early.get(model, 0) // NUM_EARLY)
        return max(base_seconds, min(doubled, MAX_MIN_WARM_SECONDS))

    def after(
        self, victims: Sequence[Candidate], worths: Mapping[str, float], now: float
    ) -> "Aging":
        """Return what it is when these were stopped."""
        num_early = dict(self.num_early)
        for victim in victims:
            is_early = victim.warm_seconds < EARLY_SECONDS
            num_early[victim.id] = num_early.get(victim.id, 0) + 1 if is_early else 0
        worth = max(self.level_at(now), *(worths[one.id] for one in victims))
        return Aging((*self.levels[1 - NUM_LEVELS :], (now, worth)), num_early)


class EvictionSettings(Protocol):
    """What of the file's `memory:` is read here."""

    @property
    def idle_before_eviction_seconds(self) -> float:
        """How long a victim was idle at least."""

    @property
    def min_warm_seconds(self) -> float:
        """The same, and how long it was up, where requests wait for what is started."""

    @property
    def starts_apart_seconds(self) -> float:
        """How long ago a victim began to start at least."""


@dataclass(frozen=True)
class Eviction:
    """Who is stopped.

    Attributes:
        victims: The models; none where all that may go would not be enough.
        reason: Why these, or why nobody.
        stays: Why each of the others that could not be chosen stays.
        state: What the next decision goes on from.
    """

    victims: tuple[str, ...]
    reason: str
    stays: Mapping[str, str]
    state: Aging


def choose(
    candidates: Sequence[Candidate],
    needed_bytes: Mapping[str, int],
    state: Aging,
    settings: EvictionSettings,
    now: float,
    *,
    is_for_request: bool,
) -> Eviction:
    """Return the cheapest models whose ends cover `needed_bytes` in every place, or none.

    Args:
        candidates: Every model that is up.
        needed_bytes: What is missing, by place: a device, or the host's memory.
        state: What the last decision returned.
        settings: How long a victim was idle.
        now: As all times, in the loop's seconds.
        is_for_request: Whether requests wait for what is started; they need not be as patient.
    """
    needed = {place: missing for place, missing in needed_bytes.items() if missing > 0}
    patience = settings.idle_before_eviction_seconds
    if is_for_request:
        patience = min(patience, settings.min_warm_seconds)
    stays: dict[str, str] = {}
    worths: dict[str, float] = {}
    for one in candidates:
        least = state.min_warm_seconds(one.id, settings.min_warm_seconds)
        if why := _why_stays(one, least, patience, settings.starts_apart_seconds):
            stays[one.id] = why
        else:
            worths[one.id] = state.level_at(now - one.idle_seconds) + one.worth(needed)
    free = [one for one in candidates if one.id in worths]
    chosen = _cover(sorted(free, key=lambda one: (worths[one.id], one.id)), needed)
    victims = _without_needless(chosen, needed)
    reason = _reason(victims, needed, free, stays)
    after = state.after(victims, worths, now) if victims else state
    return Eviction(tuple(one.id for one in victims), reason, stays, after)


def _why_stays(
    one: Candidate, least_warm_seconds: float, patience_seconds: float, apart_seconds: float
) -> str:
    """Say why a model must not be stopped; nothing where it may."""
    if one.is_busy:
        return "is busy"
    if one.is_pinned:
        return "is pinned"
    if one.warm_seconds < least_warm_seconds:
        return f"is young: up for {one.warm_seconds:.0f} s of at least {least_warm_seconds:g} s"
    if one.begun_seconds < apart_seconds:
        return f"began to start {one.begun_seconds:.0f} s ago, less than {apart_seconds:g} s"
    if one.idle_seconds < patience_seconds:
        return f"was asked {one.idle_seconds:.0f} s ago, less than {patience_seconds:g} s"
    return ""


def _cover(cheapest_first: Sequence[Candidate], needed: Mapping[str, int]) -> list[Candidate]:
    """Take models until what they give back is enough everywhere; nobody if it never is."""
    missing = dict(needed)
    chosen = []
    for one in cheapest_first:
        if not missing:
            break
        if any(one.freed_bytes.get(place, 0) > 0 for place in missing):
            chosen.append(one)
            missing = {
                place: left
                for place, before in missing.items()
                if (left := before - one.freed_bytes.get(place, 0)) > 0
            }
    return [] if missing else chosen


def _without_needless(chosen: Sequence[Candidate], needed: Mapping[str, int]) -> list[Candidate]:
    """Let go of whoever is not needed for it, the largest first."""
    kept = list(chosen)
    for one in sorted(chosen, key=lambda one: -sum(one.freed_bytes.values())):
        rest = [other for other in kept if other is not one]
        if all(_freed(rest, place) >= missing for place, missing in needed.items()):
            kept = rest
    return kept


def _freed(candidates: Iterable[Candidate], place: str) -> int:
    return sum(one.freed_bytes.get(place, 0) for one in candidates)


def _reason(
    victims: Sequence[Candidate],
    needed: Mapping[str, int],
    free: Sequence[Candidate],
    stays: Mapping[str, str],
) -> str:
    """Say why these are stopped, or nobody."""
    if not needed:
        return "nobody is stopped: nothing is missing"
    if victims:
        names = ", ".join(repr(one.id) for one in victims)
        gains = "; ".join(
            f"{format_bytes(_freed(victims, place))} for the {format_bytes(missing)} missing "
            f"on {place}"
            for place, missing in needed.items()
        )
        return f"stops {names}, the cheapest to start again for each byte: {gains}"
    short = "; ".join(
        f"{format_bytes(missing)} are missing on {place}, and whoever may go gives "
        f"{format_bytes(_freed(free, place))}"
        for place, missing in needed.items()
        if _freed(free, place) < missing
    )
    return "; ".join(
        ["nobody is stopped", short, *(f"{name!r} {why}" for name, why in stays.items())]
    )
