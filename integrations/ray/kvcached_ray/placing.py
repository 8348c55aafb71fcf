"""Which node a cold model belongs on: the gateway's placement, over all devices of all nodes."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from kvcached_gateway.policy.placement import (
    DeviceRoom,
    MoveSettings,
    PlacedModel,
    Placement,
    place,
)

__all__ = ["Choice", "Site", "choose"]


@dataclass(frozen=True)
class Site:
    """A node, as placement sees it.

    Attributes:
        id: The node.
        models: Its models, with a place or without one, by their names.
        rooms: Its devices.
        staying: Those models that are not stopped for another one now.
        failed: Those whose last start there failed.
    """

    id: str
    models: Mapping[str, PlacedModel] = field(default_factory=dict)
    rooms: tuple[DeviceRoom, ...] = ()
    staying: frozenset[str] = frozenset()
    failed: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Choice:
    """Where a model goes.

    Attributes:
        node: The node.
        devices: Which of its devices, as far as that is known; the node itself decides.
        reason: Why.
    """

    node: str
    devices: tuple[str, ...]
    reason: str


def choose(
    model_id: str,
    sites: Sequence[Site],
    among: Collection[str],
    settings: MoveSettings,
    promised: Mapping[str, Choice] | None = None,
) -> Choice | None:
    """Return the node where the KV pressure ratio will be least with a model more.

    A node whose devices nothing has run on yet is pressed by nobody: how much a CPU's pool holds
    its first engine tells. Where the model fits beside nobody it goes where it fits once those have
    gone that may; where it never fits, to the node with the fewest models, which says why. A node
    where it failed comes last.

    Args:
        model_id: The model; it has no place yet.
        sites: All nodes.
        among: Those that it may be on.
        settings: The file's `placement:`.
        promised: Where other models were sent that no report tells of yet.

    Returns:
        None where there is no node.
    """
    known = [site for site in sites if site.id in among]
    if not known:
        return None
    healthy = [site for site in known if model_id not in site.failed] or known
    given = {name: one for name, one in (promised or {}).items() if name != model_id}
    unknown = [site for site in healthy if not any(room.capacity_bytes for room in site.rooms)]
    if unknown:
        least = min(unknown, key=lambda site: (_num_placed(site, given), site.id))
        return Choice(least.id, (), "nothing has run there yet")
    wanted = [_wanted(model_id, [site]) for site in healthy]
    for is_tight in (False, True):
        others = list(_others(sites, model_id, is_tight=is_tight))
        others += _promised(sites, given)
        rooms = [_room(site, room) for site in sites for room in site.rooms]
        found = _least(model_id, healthy, wanted, others, rooms, settings)
        if found is not None:
            return found
    least = min(healthy, key=lambda site: (_num_placed(site, given), site.id))
    return Choice(least.id, (), "it fits on no node; the fewest models are there")


def _least(
    model_id: str,
    sites: Sequence[Site],
    wanted: Sequence[PlacedModel | None],
    others: Sequence[PlacedModel],
    rooms: Sequence[DeviceRoom],
    settings: MoveSettings,
) -> Choice | None:
    """Return where it will be least pressed, of the nodes that it fits on."""
    models = [model for model in wanted if model is not None]
    if not models:
        return None
    best: tuple[float, Choice] | None = None
    # One device is chosen among those of all nodes. Several have to be of one node.
    for group in [models] if models[0].tensor_parallel == 1 else [[model] for model in models]:
        allowed = frozenset().union(*(model.allowed or () for model in group))
        sizes = max(group, key=lambda model: (model.weights_bytes, model.residue_bytes))
        model = sizes._replace(id=model_id, allowed=allowed)
        found = place([*others, model], rooms, settings, 0.0)
        choice = _choice(model_id, found, sites)
        if choice is not None and (best is None or choice[0] < best[0]):
            best = choice
    return None if best is None else best[1]


def _choice(model_id: str, found: Placement, sites: Iterable[Site]) -> tuple[float, Choice] | None:
    devices = found.devices.get(model_id)
    if not devices:
        return None
    node = next(site.id for site in sites if devices[0].startswith(f"{site.id}/"))
    pressure = max(found.pressures[device] for device in devices)
    own = tuple(device.removeprefix(f"{node}/") for device in devices)
    return pressure, Choice(node, own, found.reasons[model_id])


def _wanted(model_id: str, sites: Iterable[Site]) -> PlacedModel | None:
    """Return a model without a place, with the devices that it may have on its nodes."""
    for site in sites:
        model = site.models.get(model_id)
        if model is not None:
            rooms = (room.id for room in site.rooms)
            names = rooms if model.allowed is None else (r for r in rooms if r in model.allowed)
            allowed = frozenset(f"{site.id}/{name}" for name in names)
            return model._replace(current=(), allowed=allowed)
    return None


def _others(sites: Iterable[Site], model_id: str, *, is_tight: bool) -> Iterator[PlacedModel]:
    """Yield every model that has a place; where it is tight, those that may not go."""
    for site in sites:
        for model in site.models.values():
            is_other = model.current and model.id != model_id
            if is_other and (not is_tight or model.id in site.staying):
                yield _at(site, model, model.current)


def _promised(sites: Iterable[Site], promised: Mapping[str, Choice]) -> Iterator[PlacedModel]:
    """Yield models that were sent somewhere and are not there yet."""
    for site in sites:
        for other, choice in promised.items():
            model = site.models.get(other)
            is_sent_here = choice.node == site.id and bool(choice.devices)
            if is_sent_here and model is not None and not model.current:
                yield _at(site, model, choice.devices)


def _at(site: Site, model: PlacedModel, devices: Iterable[str]) -> PlacedModel:
    return model._replace(
        id=f"{site.id}/{model.id}",
        current=tuple(f"{site.id}/{device}" for device in devices),
    )


def _num_placed(site: Site, promised: Mapping[str, Choice]) -> int:
    there = {model.id for model in site.models.values() if model.current}
    return len(there | {name for name, choice in promised.items() if choice.node == site.id})


def _room(site: Site, room: DeviceRoom) -> DeviceRoom:
    return replace(room, id=f"{site.id}/{room.id}")
