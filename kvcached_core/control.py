"""Steering instances from outside: limits, floors, priorities, asking for memory back, weights.

Every function may be called again with the same arguments: it says how far things are.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcached_core.errors import LedgerError, PolicyError
from kvcached_core.ledger import bell
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.outcome import Outcome, Result, describe
from kvcached_core.ledger.survey import open_ledgers, survey
from kvcached_core.ledger.view import DeviceView, InstanceView
from kvcached_core.ledger.weights import WeightsWish
from kvcached_core.units import check_name, parse_bytes

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


@dataclass(frozen=True)
class _Place:
    """An instance's row in one ledger."""

    ledger: Ledger
    view: InstanceView

    def now(self) -> InstanceView | None:
        """Return the row as it is now, or None if the instance is gone."""
        views = self.ledger.view().instances
        return next((view for view in views if view.row == self.view.row), None)

    def wake(self) -> None:
        """Ring the instance's bell."""
        bell.wake(self.ledger, [self.view.row])


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
    with _places(directory, [name]) as places:
        refusal = _change(
            places, [{"limit_bytes": _size(limit, "limit", place)} for place in places]
        )
        return refusal or _wait(places, lambda _, view: view.excess_bytes, wait_seconds)


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
    with _places(directory, [name]) as places:
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


def set_priority(name: str, priority: int, *, directory: Path) -> Result:
    """Set how late an instance gives: the higher the later, -1000 to 1000.

    Raises:
        LedgerError: If there is no such instance.
    """
    with _places(directory, [name]) as places:
        refusal = _change(places, [{"priority": priority} for _ in places])
        return refusal or _wait(places, lambda _place, _view: 0, 0.0)


def trim(
    names: Sequence[str],
    *,
    directory: Path,
    keep_bytes: int = 0,
    wait_seconds: float = PATIENCE_SECONDS,
) -> list[Result]:
    """Ask the named instances, or all, for all but `keep_bytes` of what no request needs.

    Raises:
        LedgerError: If a name is unknown; then nobody was asked.
    """
    with _places(directory, names) as places:
        for place in places:
            view = place.view
            if place.ledger.ask(view.row, view.cached_bytes + view.idle_bytes - keep_bytes):
                place.wake()
        deadline = time.monotonic() + wait_seconds
        by_name: dict[str, list[_Place]] = {}
        for place in places:
            by_name.setdefault(place.view.name, []).append(place)
        return [
            _wait(of_name, _still_to_give, max(deadline - time.monotonic(), 0.0))
            for of_name in by_name.values()
        ]


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
    def remaining(_place: _Place, view: InstanceView) -> int:
        if wish is WeightsWish.SLEEP:
            return view.weights_bytes
        return max(view.weights_needed_bytes - view.weights_bytes, 0)

    with _places(directory, [name]) as places:
        reason = next(filter(None, (_refusal(place.view, wish) for place in places)), "")
        if reason:
            return Result(name, Outcome.REFUSED, reason=reason)
        for place in places:
            if remaining(place, place.view) or place.view.weights_wish:
                place.ledger.set_wish(place.view.row, wish)
                place.wake()
        return _wait(places, remaining, wait_seconds)


def _refusal(view: InstanceView, wish: WeightsWish) -> str:
    if not view.weights_needed_bytes:
        return f"the weights of {view.name!r} never yield; start it with KVCACHED_WEIGHTS=yield"
    is_used = view.used_bytes > view.page_bytes  # page 0 is always used
    if wish is WeightsWish.SLEEP and (is_used or view.waiting_bytes or view.is_waking):
        return f"{view.name!r} has requests; it gives its weights when it has none"
    return ""


@contextmanager
def _places(directory: Path, names: Sequence[str]) -> Iterator[list[_Place]]:
    for name in names:
        check_name(name)
    with open_ledgers(directory) as ledgers:
        found = [_Place(ledger, view) for ledger in ledgers for view in ledger.view().instances]
        known = {place.view.name for place in found}
        unknown = [name for name in names if name not in known]
        if unknown:
            raise LedgerError(
                f"no instance is named {', '.join(map(repr, unknown))}; "
                f"there are {', '.join(sorted(known)) or 'none'}"
            )
        yield [place for place in found if not names or place.view.name in names]


def _size(text: str, what: str, place: _Place) -> int | None:
    if text.strip().lower() == NONE:
        return None
    return parse_bytes(text, what=what, whole_bytes=place.ledger.capacity_bytes)


def _change(places: list[_Place], changes: list[dict[str, Any]]) -> Result | None:
    """Change words of an instance's policy on all its devices, or on none."""
    name = places[0].view.name
    if places[0].view.is_program and changes[0].keys() & {"limit_bytes", "floor_bytes"}:
        reason = f"{name!r} is a program: limits and floors are about the KV caches of engines"
        return Result(name, Outcome.REFUSED, reason=reason)
    done: list[tuple[_Place, PolicyChange]] = []
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


def _missing_to_floor(place: _Place, view: InstanceView | None) -> int:
    if view is None:
        return 0
    return max(view.unmet_floor_bytes - max(place.ledger.free_bytes(view.row), 0), 0)


def _still_to_give(_place: _Place, view: InstanceView) -> int:
    return max(view.asked_bytes, view.coming_bytes)


def _wait(
    places: list[_Place], remaining: Callable[[_Place, InstanceView], int], seconds: float
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
