"""Models that are up, and whose requests wait for memory that others keep for as long as they live.

An idle engine gives its weights and its cache, and keeps its first page. A request that does not
fit beside such pages would wait for ever: somebody who may is stopped for it, as for a start. Where
two wait so for each other, it is the one that began later, and its requests are asked again.
"""

from collections.abc import Callable, Mapping

from kvcached_core.ledger.view import InstanceView
from kvcached_gateway.control.decisions import Decisions
from kvcached_gateway.control.machine import DeviceMemory, MachineView
from kvcached_gateway.control.sizes import first_bytes, kept_bytes
from kvcached_gateway.control.starts import Starts
from kvcached_gateway.control.stops import Stops
from kvcached_gateway.engines.starving import STARVED_SECONDS
from kvcached_gateway.models.fleet import Fleet
from kvcached_gateway.models.model import Model
from kvcached_gateway.state import State

__all__ = ["Relief", "missing_bytes"]


class Relief:
    """Who is stopped for requests of models that are up.

    Args:
        fleet: The models.
        starts: What says who starts where.
        stops: What stops models.
        decisions: Where decisions are kept.
    """

    def __init__(self, fleet: Fleet, starts: Starts, stops: Stops, decisions: Decisions) -> None:
        self._fleet = fleet
        self._starts = starts
        self._stops = stops
        self._decisions = decisions
        self._since: dict[str, float] = {}

    def decide(self, machine: MachineView, now: float) -> None:
        """Stop somebody for each model that has waited too long for what nobody gives.

        Args:
            machine: What there is.
            now: The loop's seconds.
        """
        starved = {}
        for model in self._fleet.models.values():
            if missing := self._missing(model, machine):
                starved[model.id] = missing
                self._since.setdefault(model.id, now)
        for name in self._since.keys() - starved.keys():
            del self._since[name]
            if name not in self._starts.wants:  # what a start waits for is said there
                self._decisions.forget_wait(name)
        for name, missing in starved.items():
            model = self._fleet.models[name]
            if now - self._since[name] < STARVED_SECONDS:
                continue
            if awaited := self._starts.awaited(model, model.devices, missing, machine):
                self._decisions.add(name, "wait", f"it waits {awaited}")
            else:
                self._stops.evict(model, model.devices, missing, now, self._stuck(name, starved))

    def _stuck(self, name: str, starved: Mapping[str, Mapping[str, int]]) -> set[str]:
        """Return who waits as a model does, and began to later, with no answer begun.

        Two of these would wait for each other, and never have an idle moment.
        """
        return {
            other
            for other in starved
            if (self._since[other], other) > (self._since[name], name)
            and not self._fleet.models[other].leases.have_begun
        }

    def _missing(self, model: Model, machine: MachineView) -> dict[str, int]:
        """Return what a model lacks on its devices even when all that can come back has."""
        if model.state is not State.BUSY:
            return {}
        idle = {one.settings.instance_name for one in self._fleet.all if not one.num_leases}

        def given(view: InstanceView) -> int:
            has = view.resident_bytes + view.promised_bytes
            # A busy one keeps its first page alone when its requests have ended.
            return has - (kept_bytes(view) if view.name in idle else first_bytes(view))

        return missing_bytes(model, machine, given)


def missing_bytes(
    model: Model, machine: MachineView, given: Callable[[InstanceView], int]
) -> dict[str, int]:
    """Return what a busy model lacks on its devices beside what is free and what others give.

    Args:
        model: Who waits; devices on which it lacks nothing are left out.
        machine: What there is.
        given: What another instance gives of what it has on a device; below 0 counts as nothing.
    """
    return {
        name: missing
        for name in model.devices
        if (device := machine.devices.get(name))
        for own in machine.views(model.settings.instance_name, (name,))
        if (missing := _needed_bytes(own, device) - _room_bytes(own, device, given)) > 0
    }


def _room_bytes(
    own: InstanceView, device: DeviceMemory, given: Callable[[InstanceView], int]
) -> int:
    others = (view for view in device.engines if view.row != own.row)
    return (
        device.free_bytes
        + max(own.held_bytes - own.page_bytes, 0)
        + sum(max(given(view), 0) for view in others)
    )


def _needed_bytes(own: InstanceView, device: DeviceMemory) -> int:
    """Return what a busy engine waits for: pages for requests, or its turn to have its weights.

    Until its turn comes, its weights are others', and for which pages it waits is not in its row:
    what counts is its longest request, as at a start, unless that fits beside nobody.
    """
    weights_bytes = own.weights_needed_bytes - own.weights_bytes
    if not weights_bytes and not own.weights_offered_bytes:
        return own.waiting_bytes
    fits = own.weights_needed_bytes + own.least_bytes <= (device.capacity_bytes or 0)
    request_bytes = max(own.least_bytes - own.page_bytes, 0) if fits else 0
    return max(own.waiting_bytes, weights_bytes + request_bytes)
