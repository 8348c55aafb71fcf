"""Which devices a model gets: those where the KV cache is least pressed, if it fits there.

A device's pressure is the KV pressure ratio of its models: `sum(weighted_rate) / room_bytes`, where
the room is what weights and residues leave of the device. Models without a place get one in order
of their rates, each where the ratio will be least. One model at a time moves, away from the
device with the highest ratio, and only where that gains enough.

Weights of an idle model yield, so only those of busy and pinned ones take room for good. A device
fits if residues, these weights, all floors and the largest of the other weights fit together: so
each can wake.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from kvcached_core.units import format_bytes
from kvcached_gateway.policy.load import Load, Share
from kvcached_gateway.policy.rooms import Rooms


class PlacedModel(NamedTuple):
    """A model that has a place, or wants one; sizes in bytes, over all its devices together.

    Attributes:
        id: Its name.
        weighted_rate: Its pressure, `demand.weighted_rate`; None where that is not known.
        weights_bytes: Its weights.
        residue_bytes: What it holds beside weights and KV, also while its weights are gone.
        floor_bytes: The KV memory that it can always get back.
        is_resident: Whether its weights stay: it is busy or pinned.
        tensor_parallel: On how many devices it lies.
        current: Where it runs; nothing where it does not.
        allowed: The devices that it may have; None for any.
        is_movable: Whether it may move now: idle, or with room for both copies.
        moved_at: When it moved the last time.
        class_name: Its class: where no rate is known, that of its like stands for it.
    """

    id: str
    weighted_rate: float | None
    weights_bytes: int
    residue_bytes: int = 0
    floor_bytes: int = 0
    is_resident: bool = True
    tensor_parallel: int = 1
    current: tuple[str, ...] = ()
    allowed: frozenset[str] | None = None
    is_movable: bool = True
    moved_at: float | None = None
    class_name: str | None = None


@dataclass(frozen=True)
class DeviceRoom:
    """A device.

    Attributes:
        id: Its UUID, or `host`.
        capacity_bytes: What engines may use of it.
        other_bytes: What of that others use.
    """

    id: str
    capacity_bytes: int
    other_bytes: int = 0


class MoveSettings(Protocol):
    """What of the file's `placement:` is read here."""

    @property
    def move_gain(self) -> float:
        """Which part of its device's pressure a move takes away at least."""

    @property
    def move_pause_seconds(self) -> float:
        """How long a model stays after it moved."""


@dataclass(frozen=True)
class Move:
    """A model that goes elsewhere."""

    model: str
    source: tuple[str, ...]
    target: tuple[str, ...]


@dataclass(frozen=True)
class Placement:
    """Who lies where.

    Attributes:
        devices: Those of each model that has some, before the move.
        moves: At most one.
        reasons: Why, for each model that got a place, or got none, or moves.
        pressures: The KV pressure ratio of each device, before the move.
    """

    devices: Mapping[str, tuple[str, ...]]
    moves: tuple[Move, ...]
    reasons: Mapping[str, str]
    pressures: Mapping[str, float]


def place(
    models: Sequence[PlacedModel], devices: Sequence[DeviceRoom], settings: MoveSettings, now: float
) -> Placement:
    """Return where each model lies, new ones included, and the one that should move.

    A model that fits nowhere gets no place; its reason says what is missing.
    """
    there = {room.id: Load(room.id, room.capacity_bytes - room.other_bytes) for room in devices}
    shares = {model.id: share for model, share in zip(models, _shares(models), strict=True)}
    places: dict[str, tuple[str, ...]] = {}
    reasons: dict[str, str] = {}
    for model in models:
        if model.current and all(device in there for device in model.current):
            for name in model.current:
                there[name].add(shares[model.id])
            places[model.id] = model.current
    rooms = Rooms(there)
    homeless = [model for model in models if model.id not in places]
    for model in sorted(homeless, key=lambda one: _rank(one, shares[one.id])):
        target = rooms.best(shares[model.id], model.tensor_parallel, model.allowed)
        reasons[model.id] = _reason(there, model, shares[model.id], target)
        if target:
            rooms.add(target, shares[model.id])
            places[model.id] = target
    settled = [model for model in models if model.current == places.get(model.id)]
    move = _move(there, rooms, settled, shares, settings, now)
    if move:
        reasons[move[0].model] = move[1]
    pressures = {name: load.pressure() for name, load in there.items()}
    return Placement(places, (move[0],) if move else (), reasons, pressures)


def _shares(models: Sequence[PlacedModel]) -> Iterable[Share]:
    """Return each model's share of each of its devices."""
    known: dict[str, list[float]] = {}
    for model in models:
        if model.weighted_rate is not None:
            known.setdefault(model.class_name or "", []).append(model.weighted_rate)
    usual = {name: statistics.median(rates) for name, rates in known.items()}
    for model in models:
        rate = model.weighted_rate
        if rate is None:
            rate = usual.get(model.class_name or "", 0.0)
        parts = model.tensor_parallel
        weights_bytes = -(-model.weights_bytes // parts)
        residue_bytes = -(-model.residue_bytes // parts)
        yield Share(
            rate / parts,
            residue_bytes + (weights_bytes if model.is_resident else 0),
            0 if model.is_resident else weights_bytes,
            -(-model.floor_bytes // parts),
        )


def _rank(model: PlacedModel, share: Share) -> tuple[float, int, str]:
    return (-share.rate, -model.weights_bytes, model.id)


def _allowed(there: Mapping[str, Load], model: PlacedModel) -> list[Load]:
    return [load for name, load in there.items() if model.allowed is None or name in model.allowed]


def _reason(
    there: Mapping[str, Load], model: PlacedModel, share: Share, target: tuple[str, ...]
) -> str:
    """Say why a model gets these devices, or none; before it is on them."""
    if target:
        pressure = max(there[name].pressure(plus=share) for name in target)
        return (
            f"goes to {', '.join(target)}: of the devices that it fits on, the KV pressure ratio "
            f"will be least there, {pressure:.3g}"
        )
    allowed = _allowed(there, model)
    if len(allowed) < model.tensor_parallel:
        num = model.tensor_parallel
        return f"gets no place: it needs {num} devices and may have {len(allowed)}"
    spares = sorted((load.spare_bytes(share) for load in allowed), reverse=True)
    short = 1 - spares[model.tensor_parallel - 1]
    return f"gets no place: {format_bytes(short)} more would have to be free where most is"


def _move(
    there: Mapping[str, Load],
    rooms: Rooms,
    models: Sequence[PlacedModel],
    shares: Mapping[str, Share],
    settings: MoveSettings,
    now: float,
) -> tuple[Move, str] | None:
    """Return the move away from the most pressed device that gains most, if that is enough."""
    if not there:
        return None
    worst = max(there.values(), key=lambda one: (one.pressure(), one.id))
    before = worst.pressure()
    best: tuple[float, str, Move] | None = None
    for model in models:
        if worst.id not in model.current or not _may_move(model, settings, now):
            continue
        share = shares[model.id]
        for target in rooms.best(share, 1, model.allowed, without=model.current):
            after = max(worst.pressure(minus=share), there[target].pressure(plus=share))
            gain = (before - after) / before if before else 0.0
            if best is None or (-gain, model.id) < best[:2]:
                names = (target if name == worst.id else name for name in model.current)
                best = (-gain, model.id, Move(model.id, model.current, tuple(names)))
    if best is None or -best[0] <= settings.move_gain:
        return None
    gain, _, move = best
    return move, (
        f"moves from {', '.join(move.source)} to {', '.join(move.target)}: that takes away "
        f"{-gain:.0%} of the highest KV pressure ratio, {before:.3g}; {settings.move_gain:.0%} "
        "is enough"
    )


def _may_move(model: PlacedModel, settings: MoveSettings, now: float) -> bool:
    is_rested = model.moved_at is None or now - model.moved_at >= settings.move_pause_seconds
    return model.is_movable and is_rested
