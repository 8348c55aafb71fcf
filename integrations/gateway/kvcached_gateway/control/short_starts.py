"""Starts that somebody waits for and that find no room: what they lack, and who has it.

What neighbours have that always have requests is never free for a start, and none of these is ever
idle, so that it could be stopped.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

from kvcached_core.ledger.view import InstanceView
from kvcached_gateway.control.demands import Demands
from kvcached_gateway.control.machine import MachineView
from kvcached_gateway.control.rooms import has_gaps
from kvcached_gateway.control.sizes import first_bytes
from kvcached_gateway.control.starts import Starts
from kvcached_gateway.control.stops import Stops
from kvcached_gateway.control.wants import Lack
from kvcached_gateway.control.weights_had import WeightsHad
from kvcached_gateway.line.grantor import Readiness
from kvcached_gateway.models.fleet import Fleet
from kvcached_gateway.models.model import Model
from kvcached_gateway.state import UP, State

__all__ = ["ShortStarts"]

NOTHING = Lack((), {})


class ShortStarts:
    """Starts that neighbours hold up which always have requests.

    Args:
        fleet: The models.
        starts: What is wanted, and what it lacks.
        stops: Who may be stopped for it.
        demands: Whose requests wait.
        had: What is known of the models' weights.
    """

    def __init__(
        self, fleet: Fleet, starts: Starts, stops: Stops, demands: Demands, had: WeightsHad
    ) -> None:
        self._fleet = fleet
        self._starts = starts
        self._stops = stops
        self._demands = demands
        self._had = had

    def waiting(self, machine: MachineView, before: Iterable[str], now: float) -> set[str]:
        """Return who waits for a start, or for the memory of one that has begun.

        Args:
            machine: What there is.
            before: For whom others hold back: only these wait for what has begun.
            now: The loop's seconds.
        """
        models = self._fleet.models
        wanted = {name for name in self._starts.wants if name in models}
        begun = {name for name in before if name in models and _lacks(models[name], machine)}
        return {
            name
            for name in wanted | begun
            if models[name].state not in UP and self._is_waited_for(models[name], now)
        }

    def is_served(self, model: Model) -> bool:
        """Whether a start has begun, or waits for memory of those that were stopped for it."""
        return _has_begun(model) or bool(self._stops.givers.of(model.id))

    def missing(self, model: Model, held: Collection[str], now: float) -> dict[str, int]:
        """Return what a start lacks beyond what idle ones give when they are stopped, in bytes.

        What running requests have is not on its way to it: others follow them.

        Args:
            model: Which one shall start.
            held: Who holds back, for it or for others.
            now: The loop's seconds.
        """
        lack = self._starts.lacks.get(model.id, NOTHING)
        idle = [
            (one, why)
            for one, why in self._stops.ends(lack.devices, now)
            if not one.is_busy and not one.is_pinned and one.id not in held
        ]
        if not _left(lack.missing, [one.freed_bytes for one, _ in idle]):
            return {}  # it comes, at the latest when they are no longer young
        return _left(lack.missing, [one.freed_bytes for one, why in idle if not why])

    def given(
        self, model: Model, machine: MachineView, before: Collection[str], now: float
    ) -> list[Mapping[str, Mapping[str, int]]]:
        """Return what each busy neighbour has that holding back would give a start.

        Args:
            model: Which one shall start.
            machine: What there is.
            before: Who holds back for it already.
            now: The loop's seconds.

        Returns:
            What they give by themselves when their answers have ended; and the same with the ends
            of those that may be stopped then.
        """
        devices = self._starts.lacks.get(model.id, NOTHING).devices
        others = [
            other
            for other in self._fleet.models.values()
            if other.id in before or (other is not model and other.state in UP and other.num_leases)
        ]
        names = {other.id for other in others}
        ends = {
            one.id: one.freed_bytes
            for one, why in self._stops.ends(devices, now, names)
            if one.id in names and not why
        }

        def given(other: Model, freed_bytes: Mapping[str, int] | None) -> Mapping[str, int]:
            found = Counter(freed_bytes or {})
            for name in devices:
                for view in machine.views(other.settings.instance_name, (name,)):
                    weights_bytes = self._weights_bytes(
                        other, view, now, is_ended=freed_bytes is not None
                    )
                    found[name] += weights_bytes + _requests_bytes(view)
            return found

        return [
            {other.id: given(other, None) for other in others},
            {other.id: given(other, ends.get(other.id)) for other in others},
        ]

    def _is_waited_for(self, model: Model, now: float) -> bool:
        """Whether requests wait for a model, or it was ordered: that waits as long as a request."""
        ordered_at = self._starts.orders.get(model.id, -math.inf)
        is_ordered = now - ordered_at < model.settings.max_wait_seconds
        return is_ordered or bool(self._demands.waiting(model.id))

    def _weights_bytes(
        self, model: Model, view: InstanceView, now: float, *, is_ended: bool
    ) -> int:
        """Return the weights that a model gives, beside what a start counts on already."""
        if has_gaps(model, now):
            return 0
        if is_ended:
            return view.weights_bytes if model.num_leases else 0  # an idle one's end has them in it
        if self._had.gives_none(model.id):
            return 0
        return view.weights_bytes - (0 if model.num_leases else view.weights_offered_bytes)


def _has_begun(model: Model) -> bool:
    """Whether an engine comes up, or is about to."""
    return model.readiness is Readiness.COMING and model.state is not State.DRAINING


def _lacks(model: Model, machine: MachineView) -> bool:
    """Whether a start has begun, and its engine has not all of its memory.

    The first page of its KV cache comes behind its weights.
    """
    rows = machine.views(model.settings.instance_name, model.devices) if model.devices else []
    has_all = bool(rows) and len(rows) == len(model.devices) and all(row.held_bytes for row in rows)
    return _has_begun(model) and not has_all


def _requests_bytes(view: InstanceView) -> int:
    """Return what an engine's requests have that a start does not count on."""
    given_bytes = view.idle_bytes + view.cached_bytes
    return max(view.held_bytes - given_bytes - first_bytes(view), 0)


def _left(missing: Mapping[str, int], given: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Return what is still missing when some models gave what they have."""
    left = {
        place: num_bytes - sum(each.get(place, 0) for each in given)
        for place, num_bytes in missing.items()
    }
    return {place: num_bytes for place, num_bytes in left.items() if num_bytes > 0}
