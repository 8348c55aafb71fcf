"""Steering instances from outside: limits, floors, priorities, asking for memory back, weights.

Every function may be called again with the same arguments: it says how far things are. A ledger
that cannot be used keeps none from what it does on other devices (`Result.problems`).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcached_core.errors import LedgerBusyError, LedgerError, PolicyError
from kvcached_core.ledger import bell
from kvcached_core.ledger.outcome import Outcome, Result, describe
from kvcached_core.ledger.survey import Place, open_places, survey
from kvcached_core.ledger.view import DeviceView, InstanceView
from kvcached_core.ledger.weights import WeightsWish
from kvcached_core.units import parse_bytes

if TYPE_CHECKING:
    from kvcached_core.ledger.members import PolicyChange

__all__ = [
    "Outcome",
    "Result",
    "describe",
    "devices",
    "set_floor",
    "set_limit",
    "set_priority",
    "sleep",
    "trim",
    "wake",
]

LOOK_SECONDS = 0.005
PATIENCE_SECONDS = 2.0
NONE = "none"


def devices(directory: Path) -> list[DeviceView]:
    """Return every device that has a ledger in `directory`; none is not an error.

    Raises:
        LedgerError: If one of them cannot be read.
    """
    found = survey(directory)
    if found.problems:
        raise LedgerError(found.problems[0])
    return found.devices


def set_limit(
    name: str, limit: str, *, directory: Path, wait_seconds: float = PATIENCE_SECONDS
) -> Result:
    """Set the most that an instance may hold on each of its devices.

    Above it, its idle pages go, then cached ones, then requests are preempted until it holds.

    Args:
        name: The instance.
        limit: A size such as `24GiB`, a share such as `50%` of what all share, or `none`.
        directory: The folder of the ledgers.
        wait_seconds: How long to wait until it holds.

    Raises:
        ConfigError: If the limit is no size.
        LedgerError: If there is no such instance.
    """

    def set_on(places: list[Place]) -> Result:
        refusal = _change(
            places, [{"limit_bytes": _size(limit, "limit", place)} for place in places]
        )
        return refusal or _wait(places, lambda _, view: view.excess_bytes, wait_seconds)

    return _steer(name, directory, set_on)


def set_floor(
    name: str,
    floor: str,
    *,
    directory: Path,
    wait_seconds: float = PATIENCE_SECONDS,
    is_forced: bool = False,
) -> Result:
    """Set what an instance can always get back on each of its devices.

    Others are asked at once for idle and cached pages, as far as the floor is not free; their
    requests stop for it only when the instance needs the memory. A floor that leaves no room for
    the longest request of another instance is refused, unless it is forced.

    Args:
        name: The instance.
        floor: A size such as `24GiB`, a share such as `50%` of what all share, or `none`.
        directory: The folder of the ledgers.
        wait_seconds: How long to wait until it is free.
        is_forced: Whether requests of others may have to wait for as long as the floor stays.

    Raises:
        ConfigError: If the floor is no size.
        LedgerError: If there is no such instance.
    """

    def set_on(places: list[Place]) -> Result:
        refusal = _change(
            places,
            [
                {"floor_bytes": _size(floor, "floor", place) or 0, "is_forced": is_forced}
                for place in places
            ],
        )
        if refusal is not None:
            return refusal
        for place in places:
            missing = _missing_to_floor(place, place.now())
            if missing:
                asked = place.ledger.ask_peers(place.view.row, missing, is_waiting=False)
                bell.wake(place.ledger, asked)
        return _wait(places, _missing_to_floor, wait_seconds)

    return _steer(name, directory, set_on)


def set_priority(name: str, priority: int, *, directory: Path) -> Result:
    """Set how late an instance gives: the higher the later, -1000 to 1000.

    Raises:
        LedgerError: If there is no such instance.
    """

    def set_on(places: list[Place]) -> Result:
        refusal = _change(places, [{"priority": priority} for _ in places])
        return refusal or _wait(places, lambda _place, _view: 0, 0.0)

    return _steer(name, directory, set_on)


def trim(
    names: Sequence[str],
    *,
    directory: Path,
    keep_bytes: int = 0,
    wait_seconds: float = PATIENCE_SECONDS,
) -> list[Result]:
    """Ask the named instances, or all, for all but `keep_bytes` of what no request needs.

    Raises:
        LedgerError: If a name is unknown, or no ledger can be used; then nobody was asked.
    """
    with open_places(directory, names) as (places, problems):
        by_name: dict[str, list[Place]] = {}
        for place in _ask(places, keep_bytes, problems):
            by_name.setdefault(place.view.name, []).append(place)
        deadline = time.monotonic() + wait_seconds
        results = [
            _wait(of_name, _still_to_give, max(deadline - time.monotonic(), 0.0))
            for of_name in by_name.values()
        ]
        return [replace(result, problems=tuple(problems)) for result in results]


def sleep(name: str, *, directory: Path, wait_seconds: float = PATIENCE_SECONDS) -> Result:
    """Make an idle instance give all its weights; a request for it, or `wake`, brings them back.

    Raises:
        LedgerError: If there is no such instance.
    """
    return _wish(name, WeightsWish.SLEEP, directory, wait_seconds)


def wake(name: str, *, directory: Path, wait_seconds: float = PATIENCE_SECONDS) -> Result:
    """Make an instance get its weights back before the first request does.

    Raises:
        LedgerError: If there is no such instance.
    """
    return _wish(name, WeightsWish.WAKE, directory, wait_seconds)


def _wish(name: str, wish: WeightsWish, directory: Path, wait_seconds: float) -> Result:
    def remaining(_place: Place, view: InstanceView) -> int:
        if wish is WeightsWish.SLEEP:
            return view.weights_bytes
        return max(view.weights_needed_bytes - view.weights_bytes, 0)

    def set_on(places: list[Place]) -> Result:
        reason = next(filter(None, (_refusal(place.view, wish) for place in places)), "")
        if reason:
            return Result(name, Outcome.REFUSED, reason=reason)
        for place in places:
            if remaining(place, place.view) or place.view.weights_wish:
                place.ledger.set_wish(place.view.row, wish)
                place.wake()
        return _wait(places, remaining, wait_seconds)

    return _steer(name, directory, set_on)


def _steer(name: str, directory: Path, act: Callable[[list[Place]], Result]) -> Result:
    """Do something where an instance is; say which ledgers could not be used."""
    with open_places(directory, [name]) as (places, problems):
        return replace(act(places), problems=tuple(problems))


def _refusal(view: InstanceView, wish: WeightsWish) -> str:
    if not view.weights_needed_bytes:
        return f"the weights of {view.name!r} never yield; start it with KVCACHED_WEIGHTS=yield"
    is_used = view.used_bytes > view.page_bytes  # page 0 is always used
    if wish is WeightsWish.SLEEP and (is_used or view.waiting_bytes or view.is_waking):
        return f"{view.name!r} has requests; it gives its weights when it has none"
    return ""


def _ask(places: list[Place], keep_bytes: int, problems: list[str]) -> list[Place]:
    """Ask instances to give; return those that were asked, and add why others were not."""
    asked: list[Place] = []
    busy: set[Path] = set()
    for place in places:
        view = place.view
        if place.ledger.path in busy:
            continue
        try:
            if place.ledger.ask(view.row, view.cached_bytes + view.idle_bytes - keep_bytes):
                place.wake()
        except LedgerBusyError as error:
            busy.add(place.ledger.path)
            problems.append(str(error))
        else:
            asked.append(place)
    if places and not asked:
        raise LedgerError("; ".join(problems))
    return asked


def _size(text: str, what: str, place: Place) -> int | None:
    if text.strip().lower() == NONE:
        return None
    return parse_bytes(text, what=what, whole_bytes=place.ledger.capacity_bytes)


def _change(places: list[Place], changes: list[dict[str, Any]]) -> Result | None:
    """Change words of an instance's policy on all its devices, or on none."""
    name = places[0].view.name
    if places[0].view.is_program and changes[0].keys() & {"limit_bytes", "floor_bytes"}:
        reason = f"{name!r} is a program: limits and floors are about the KV caches of engines"
        return Result(name, Outcome.REFUSED, reason=reason)
    done: list[tuple[Place, PolicyChange]] = []
    try:
        for place, words in zip(places, changes, strict=True):
            done.append((place, place.ledger.change_policy(place.view.row, **words)))
    except BaseException as error:  # Ctrl-C, too, which may come while a lock is waited for
        for place, change in done:
            place.ledger.undo_policy(place.view.row, change)
        if not isinstance(error, PolicyError):
            raise
        return Result(name, Outcome.REFUSED, reason=str(error))
    for place, change in done:
        bell.wake(place.ledger, {place.view.row, *change.waiting})
    return None


def _missing_to_floor(place: Place, view: InstanceView | None) -> int:
    if view is None:
        return 0
    return max(view.unmet_floor_bytes - max(place.ledger.free_bytes(view.row), 0), 0)


def _still_to_give(_place: Place, view: InstanceView) -> int:
    return max(view.asked_bytes, view.coming_bytes)


def _wait(
    places: list[Place], remaining: Callable[[Place, InstanceView], int], seconds: float
) -> Result:
    deadline = time.monotonic() + seconds
    before = sum(place.view.resident_bytes for place in places)
    while True:
        views = [(place, view) for place in places if (view := place.now()) is not None]
        left = sum(remaining(place, view) for place, view in views)
        after = sum(view.resident_bytes for _, view in views)
        if not left or time.monotonic() >= deadline:
            outcome = Outcome.IN_PROGRESS if left else Outcome.APPLIED
            return Result(places[0].view.name, outcome, left, before, after)
        time.sleep(LOOK_SECONDS)
