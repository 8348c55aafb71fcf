"""Who takes no new requests for a while, so that a model that has no room has its turn.

Weights of a busy model never go. Where a model waits for room that neighbours have which are never
idle, for its weights or for its start, those that have had their weights longest hold back: their
answers end, their weights yield, and their own requests wait until the other one has its weights.
Two models do not take turns faster than a `turn` each.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from kvcached_core.units import format_bytes


class Waiter(NamedTuple):
    """A model whose requests wait for its weights, or for its start.

    Attributes:
        id: Its name.
        waited_seconds: How long they have.
        missing_bytes: What it lacks, by place: a device, or the host's memory. That is beyond all
            that comes without anybody's holding back.
        priority: Its priority in the ledger.
    """

    id: str
    waited_seconds: float
    missing_bytes: Mapping[str, int]
    priority: int = 0


class Holder(NamedTuple):
    """A model that has what a waiter lacks, and requests, or that holds back already.

    Attributes:
        id: Its name.
        given_bytes: What it would give, by place.
        had_seconds: How long it has had all of its weights; infinite where it gave some.
        priority: Its priority in the ledger.
        is_pinned: Whether it never holds back.
        kept_seconds: How long its engine keeps its weights from equals after it has them back.
        is_held: Whether it holds back for this waiter.
    """

    id: str
    given_bytes: Mapping[str, int]
    had_seconds: float = math.inf
    priority: int = 0
    is_pinned: bool = False
    kept_seconds: float = 0.0
    is_held: bool = False


class Turn(NamedTuple):
    """Who holds back for a waiter.

    Attributes:
        held: The models; none where all that may would not be enough.
        reason: Why these, or why nobody; nothing where that is no question.
    """

    held: tuple[str, ...]
    reason: str = ""


NOBODY = Turn(())


def choose(waiter: Waiter, holders: Sequence[Holder], turn_seconds: float) -> Turn:
    """Return who holds back for a waiter: enough of those that have had their weights longest.

    Whoever holds back already goes on, also where nothing is missing any more: it would take back
    what the waiter is about to have.

    Args:
        waiter: Who waits.
        holders: Who has weights on its devices, and is busy or holds back for it.
        turn_seconds: How long the waiter has to have waited, and a holder to have had its weights.
    """
    needed = {place: missing for place, missing in waiter.missing_bytes.items() if missing > 0}
    stays = {one.id: why for one in holders if (why := _why_not(one, waiter, turn_seconds))}
    free = [one for one in holders if one.id not in stays]
    held = [one for one in free if one.is_held]
    if not needed:
        return _turn(waiter, held, needed, turn_seconds)
    if waiter.waited_seconds < turn_seconds:
        return NOBODY
    longest_first = sorted(free, key=lambda one: (-one.had_seconds, one.id))
    more = _cover(held, [one for one in longest_first if not one.is_held], needed)
    chosen = [*held, *more]
    if _covers(chosen, needed):
        return _turn(waiter, chosen, needed, turn_seconds)
    if not _covers(holders, needed):
        return NOBODY
    why = "; ".join(f"{name!r} {each}" for name, each in stays.items())
    return Turn((), f"it waits for {_sizes(needed)}, and nobody holds back for it: {why}")


def _why_not(one: Holder, waiter: Waiter, turn_seconds: float) -> str:
    """Say why a model must not hold back; nothing where it may."""
    if one.is_pinned:
        return "is pinned"
    if one.priority > waiter.priority:
        return "has a higher priority"
    if one.had_seconds < turn_seconds:
        return f"has had its weights for less than {turn_seconds:g} s"
    if one.kept_seconds > 0 and one.priority == waiter.priority:
        return "keeps its weights for a while after they came back"
    return ""


def _cover(
    held: Sequence[Holder], others: Iterable[Holder], needed: Mapping[str, int]
) -> list[Holder]:
    """Take models in order until it is enough, then let go of the needless, the last first."""
    more: list[Holder] = []
    for one in others:
        if _covers([*held, *more], needed):
            break
        more.append(one)
    for one in reversed(more.copy()):
        rest = [other for other in more if other is not one]
        if _covers([*held, *rest], needed):
            more = rest
    return more


def _covers(those: Iterable[Holder], needed: Mapping[str, int]) -> bool:
    given = [one.given_bytes for one in those]
    return all(
        sum(each.get(place, 0) for each in given) >= missing for place, missing in needed.items()
    )


def _turn(
    waiter: Waiter, chosen: Sequence[Holder], needed: Mapping[str, int], turn_seconds: float
) -> Turn:
    if not chosen:
        return NOBODY
    names = tuple(one.id for one in chosen)
    reason = (
        f"{', '.join(map(repr, names))} {'takes' if len(names) == 1 else 'take'} no new requests "
        f"until {waiter.id!r} has its weights"
    )
    if needed:
        reason += f": it has waited more than {turn_seconds:g} s for {_sizes(needed)}"
    return Turn(names, reason)


def _sizes(needed: Mapping[str, int]) -> str:
    return " and ".join(f"{format_bytes(missing)} on {place}" for place, missing in needed.items())
