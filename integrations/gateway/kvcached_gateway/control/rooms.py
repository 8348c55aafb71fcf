"""Whether what a start takes is free, on its devices and of the host's memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvcached_core.units import GIB, format_bytes
from kvcached_gateway.control.machine import HOST_MEMORY, MachineView
from kvcached_gateway.control.sizes import Sizes, reachable_bytes
from kvcached_gateway.models.fleet import Fleet
from kvcached_gateway.models.model import Model
from kvcached_gateway.state import UP, State

__all__ = ["Room", "Rooms"]

PROCESS_BYTES = 2 * GIB  # of an engine that starts, while none was ever measured
GAP_SECONDS = 5.0  # an engine that starts waits at least as long for weights of others


def has_gaps(model: Model, now: float) -> bool:
    """Whether a model that has requests had none a moment ago: it will have none for a while."""
    return bool(model.num_leases) and now - model.since < GAP_SECONDS


@dataclass(frozen=True)
class Room:
    """What a start takes and finds, in bytes by place; where nobody knows what is free, no place.

    Attributes:
        needed: What it takes.
        free: What it finds: what nobody has, and what idle ones give back by themselves.
    """

    needed: Mapping[str, int]
    free: Mapping[str, int]

    @property
    def missing(self) -> dict[str, int]:
        """What is missing, where something is."""
        return {
            place: need - self.free[place]
            for place, need in self.needed.items()
            if place in self.free and need > self.free[place]
        }

    def sentence(self) -> str:
        """Say what it takes and finds."""
        parts = [
            f"{format_bytes(need)} of {place}, where {format_bytes(max(free, 0))} are free"
            for place, free in self.free.items()
            if (need := self.needed.get(place, 0))
        ]
        return f"it takes {' and '.join(parts)}" if parts else "what it takes is not known yet"


class Rooms:
    """What is free for a start.

    Args:
        fleet: The models.
        sizes: What models take.
    """

    def __init__(self, fleet: Fleet, sizes: Sizes) -> None:
        self._fleet = fleet
        self._sizes = sizes

    def of(self, model: Model, devices: Sequence[str], machine: MachineView, now: float) -> Room:
        """Return what the start of a model on some devices takes and finds.

        Weights of busy models go in the next gap between their requests, if there are gaps: a start
        waits for them in its engine. So only one without a gap for a while keeps them.
        """
        up = [other for other in self._fleet.all if other.state in UP]
        idle = {other.settings.instance_name for other in up if not other.num_leases}
        soon = {other.settings.instance_name for other in up if has_gaps(other, now)}
        free = {HOST_MEMORY: self._free_host_bytes(machine)}
        for name in devices:
            reachable = reachable_bytes(machine.devices[name], idle, soon)
            if reachable is not None:
                free[name] = reachable - self._coming_bytes(name, machine)
        # One that had more than the file allows may have it again, with nobody beside it.
        needed = {HOST_MEMORY: min(self._sizes.host_bytes(model.settings), machine.budget_bytes)}
        for name in devices:
            needed[name] = self._sizes.device_bytes(model.settings, machine.devices[name])
        return Room(needed, free)

    def _free_host_bytes(self, machine: MachineView) -> int:
        """Return what is left of the host's memory once every engine has all that it may have.

        An engine's copy of its weights is made when there is time, but it counts from its start:
        without it the weights could not yield.
        """
        is_there = UP | {State.STARTING, State.DRAINING}
        there = [model.settings for model in self._fleet.all if model.state in is_there]
        copies_bytes = sum(self._sizes.copy_bytes(settings) for settings in there)
        # One that is being ended has no engine any more, and not given back what it had.
        going_bytes = sum(
            self._sizes.of(model.id).process_bytes
            for model in self._fleet.all
            if model.state is State.DRAINING and model.engine is None
        )
        missing_bytes = max(copies_bytes - machine.copies_bytes, 0) + going_bytes
        return machine.free_host_bytes - missing_bytes - self._coming_bytes(HOST_MEMORY, machine)

    def _coming_bytes(self, place: str, machine: MachineView) -> int:
        """Return what engines that start will still take of a place, beside their copies."""
        coming = 0
        for model in self._fleet.all:
            if model.state is not State.STARTING:
                continue
            if place == HOST_MEMORY:
                needed = self._sizes.process_bytes(model.settings) or PROCESS_BYTES
                has = machine.engines_bytes.get(model.id, 0)
            elif place in model.devices:
                needed = self._sizes.device_bytes(model.settings, machine.devices[place])
                views = machine.views(model.settings.instance_name, (place,))
                has = sum(view.resident_bytes + view.promised_bytes for view in views)
            else:
                continue
            coming += max(needed - has, 0)
        return coming
