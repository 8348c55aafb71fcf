"""Where models start, and the one that moves: its source serves until the target has answered."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kvcached_core.ledger.view import InstanceView
from kvcached_gateway.control.decisions import Decisions
from kvcached_gateway.control.demands import Demands
from kvcached_gateway.control.machine import MachineView
from kvcached_gateway.control.sizes import Sizes
from kvcached_gateway.control.starts import Starts
from kvcached_gateway.control.stops import Stops
from kvcached_gateway.models.fleet import Fleet
from kvcached_gateway.models.model import Model
from kvcached_gateway.policy.placement import DeviceRoom, Move, PlacedModel, place
from kvcached_gateway.state import GONE, UP, State

__all__ = ["Moves", "Scene"]


@dataclass(frozen=True)
class Scene:
    """What placement sees of a machine.

    Attributes:
        models: Models that have an engine of ours, or may have one.
        rooms: The devices.
        staying: Those models that are not stopped for another one now.
    """

    models: tuple[PlacedModel, ...]
    rooms: tuple[DeviceRoom, ...]
    staying: frozenset[str]


class Moves:
    """Places, and at most one move at a time.

    Args:
        fleet: The models.
        sizes: What models take.
        demands: What is asked of each.
        decisions: Where decisions are kept.
        starts: Whether there is room for a start, and nobody else's is on its way.
        stops: Who may be stopped for another.

    Attributes:
        pressures: The KV pressure ratio of each device.
    """

    def __init__(
        self,
        fleet: Fleet,
        sizes: Sizes,
        demands: Demands,
        decisions: Decisions,
        starts: Starts,
        stops: Stops,
    ) -> None:
        self._fleet = fleet
        self._sizes = sizes
        self._demands = demands
        self._decisions = decisions
        self._starts = starts
        self._stops = stops
        self._target: Model | None = None
        self._moved_at: dict[str, float] = {}
        self.pressures: Mapping[str, float] = {}

    def place(self, model: Model, machine: MachineView) -> tuple[tuple[str, ...], str]:
        """Return where a cold model belongs, and why; nowhere where it fits nowhere.

        One that fits beside nobody goes where it fits once those have gone that may, or else those
        that are busy and may hold back for it. One device, or devices that the file names, are no
        choice.
        """
        num = model.settings.tensor_parallel
        allowed = self._allowed(model, machine)
        if len(allowed) <= num:
            if len(allowed) == num:
                return allowed, f"it may run on {', '.join(allowed)} alone"
            return (), f"it needs {num} devices and may have {len(allowed)}"
        others = [other for other in self._fleet.models.values() if other.devices]
        staying = [other for other in others if self._stops.may_not_go(other)]
        keeping = [
            other
            for other in staying
            if self._stops.never_goes(other) or other.priority > model.priority
        ]
        why = ""
        for beside in (others, staying, keeping):
            found = place(
                [self._placed(one, machine) for one in (*beside, model)],
                self._rooms(machine),
                self._fleet.settings.placement,
                model.since,
            )
            if devices := found.devices.get(model.id):
                return devices, found.reasons[model.id]
            why = why or found.reasons[model.id]
        return (), why

    def scene(self, machine: MachineView, *, is_whole: bool) -> Scene:
        """Return what placement sees, for whoever places over many machines.

        Args:
            machine: What there is.
            is_whole: Whether models without a place are in it.
        """
        ours = [
            model
            for model in self._fleet.models.values()
            if model.devices or (is_whole and not model.settings.is_remote)
        ]
        return Scene(
            tuple(self._placed(model, machine) for model in ours),
            tuple(self._rooms(machine)),
            frozenset(model.id for model in ours if self._stops.may_not_go(model)),
        )

    def decide(self, machine: MachineView, now: float) -> None:
        """Begin a move if one gains enough, and none is on its way.

        Args:
            machine: What there is.
            now: The loop's seconds.
        """
        found = place(
            [self._placed(one, machine) for one in self._fleet.models.values() if one.devices],
            self._rooms(machine),
            self._fleet.settings.placement,
            now,
        )
        self.pressures = found.pressures
        for move in found.moves if self._target is None else ():
            self._begin(move, found.reasons[move.model], machine, now)

    def changed(self, model: Model, after: State) -> None:
        """Take notice of a transition: a target takes over when it answered, or is dropped."""
        target = self._target
        if target is None or model is not target:
            return
        if after in UP:
            self._target = None
            self._fleet.switch(target)
        elif after in GONE:
            self._target = None
            self._decisions.add(model.id, "move", f"it stays: {model.reason}")
            self._fleet.drop(model)

    def _begin(self, move: Move, reason: str, machine: MachineView, now: float) -> None:
        """Start a second engine, if that takes nothing from anybody."""
        source = self._fleet.models[move.model]
        room = self._starts.rooms.of(source, move.target, machine, now)
        if self._starts.passing(source, machine) or room.missing:
            return
        if self._starts.starting_on(source, move.target):
            return
        self._moved_at[move.model] = now
        self._decisions.add(move.model, "move", reason)
        self._target = self._fleet.second(source)
        self._target.start(move.target, reason)

    def _placed(self, model: Model, machine: MachineView) -> PlacedModel:
        num = model.settings.tensor_parallel
        views = machine.views(model.settings.instance_name, model.devices)
        return PlacedModel(
            id=model.id,
            weighted_rate=self._demands.weighted_rate(
                model, self._sizes, self._fleet.settings.classes
            ),
            weights_bytes=self._sizes.weights_bytes(model.settings) * num,
            residue_bytes=self._sizes.residue_bytes(model.settings) * num,
            floor_bytes=sum(view.floor_bytes for view in views),
            is_resident=self._stays(model, views),
            tensor_parallel=num,
            current=model.devices,
            allowed=frozenset(self._allowed(model, machine)),
            is_movable=model.state in UP and not model.settings.devices,
            moved_at=self._moved_at.get(model.id),
            class_name=model.settings.class_name,
        )

    def _stays(self, model: Model, views: Iterable[InstanceView]) -> bool:
        never_yields = any(not view.weights_needed_bytes for view in views)
        return model.settings.when_idle != "yield" or bool(model.num_leases) or never_yields

    def _rooms(self, machine: MachineView) -> list[DeviceRoom]:
        return [
            DeviceRoom(
                name,
                device.free_bytes if device.capacity_bytes is None else device.capacity_bytes,
                self._sizes.others_bytes(device),
            )
            for name, device in machine.devices.items()
        ]

    def _allowed(self, model: Model, machine: MachineView) -> tuple[str, ...]:
        """Return the devices that the file lets a model have, in the ledgers' words."""
        named = model.settings.devices
        if named is None:
            return tuple(machine.devices)
        return tuple(
            name for name in machine.devices if {name, machine.numbers.get(name)} & set(named)
        )
