"""Which wanted models start now, where, and who has to be stopped for it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from kvcached_gateway.control.decisions import Decisions
from kvcached_gateway.control.demands import Demands
from kvcached_gateway.control.givers import names
from kvcached_gateway.control.holds import Holds
from kvcached_gateway.control.machine import HOST_MEMORY, MachineView
from kvcached_gateway.control.rooms import Rooms
from kvcached_gateway.control.sizes import Sizes
from kvcached_gateway.control.stops import Stops
from kvcached_gateway.control.wants import Cause, Lack, Want
from kvcached_gateway.models.fleet import Fleet
from kvcached_gateway.models.model import Model
from kvcached_gateway.state import GONE, UP, State

__all__ = ["Place", "Starts"]

# For most of its start an engine has two processes that import; more of them only slow each other.
CORES_EACH = 4

# Says where a model belongs, and why; nowhere where it fits nowhere.
Place = Callable[[Model, MachineView], tuple[tuple[str, ...], str]]


class Starts:
    """The starts that are wanted, and the stops that they wait for.

    Args:
        fleet: The models.
        sizes: What models take.
        demands: What is asked of each.
        decisions: Where decisions are kept.
        stops: Who is stopped for whom.
        holds: Who takes no new requests, and for whom.

    Attributes:
        lacks: What each start lacks that could not begin at the last look, by its model.
        orders: When each model was ordered last that is not up yet, by the loop's clock.
    """

    def __init__(
        self,
        fleet: Fleet,
        sizes: Sizes,
        demands: Demands,
        decisions: Decisions,
        stops: Stops,
        holds: Holds,
    ) -> None:
        self._fleet = fleet
        self._demands = demands
        self._decisions = decisions
        self._stops = stops
        self._wants: dict[str, Want] = {}
        self._holds = holds
        self.lacks: dict[str, Lack] = {}
        self.orders: dict[str, float] = {}
        # For whom each place's memory is, of those that wait for some that is on its way.
        self._claims: dict[str, str] = {}
        self.rooms = Rooms(fleet, sizes)

    @property
    def wants(self) -> Mapping[str, Want]:
        """What is wanted and has not begun."""
        return self._wants

    def want(self, want: Want) -> None:
        """Want a model up; the cause that counts more stands."""
        if want.cause is Cause.ORDER:
            self.orders[want.model_id] = want.since
        old = self._wants.get(want.model_id)
        if old is None:
            self._wants[want.model_id] = want
        elif want.cause < old.cause:
            was_asked_for = old.cause is not Cause.AHEAD
            since = min(old.since, want.since) if was_asked_for else want.since
            self._wants[want.model_id] = replace(want, since=since)

    def forget(self, model_id: str) -> None:
        """Want a model no longer."""
        self._wants.pop(model_id, None)
        self._stops.givers.forget(model_id)
        self._decisions.forget_wait(model_id)

    def take_back(self, model_id: str) -> None:
        """Want a model for the requests that wait for it alone, or no longer where none does."""
        self.orders.pop(model_id, None)
        want = self._wants.get(model_id)
        if want and self._demands.waiting(model_id):
            self._wants[model_id] = replace(want, cause=Cause.REQUEST)
        elif want:
            self.forget(model_id)

    def decide(self, machine: MachineView, now: float, place: Place) -> None:
        """Start one model, or stop those that have to go for one; the next look tells what is left.

        Who was wanted first is first: where it waits for memory that is on its way, no later one
        takes what is free on the same device.

        Args:
            machine: What there is.
            now: The loop's seconds.
            place: Says where a model belongs.
        """
        self._stops.givers.forget_gone()
        self._claims.clear()
        self.lacks.clear()
        there = {name for name, model in self._fleet.models.items() if model.state not in UP}
        self.orders = {name: at for name, at in self.orders.items() if name in there}
        first = ""
        for want in sorted(self._wants.values(), key=lambda one: one.rank):
            if first:
                if not self._decisions.hindrance(want.model_id):
                    self._decisions.add(want.model_id, "wait", f"{first!r} goes first")
                continue
            model = self._fleet.models.get(want.model_id)
            if model is None or not self._may_begin(model, want):
                if model is None or model.state is not State.DRAINING:
                    self.forget(want.model_id)
            elif model.settings.is_remote:
                self.forget(model.id)
                model.start((), want.reason)
            elif self._consider(want, model, machine, now, place):
                first = model.id

    def passing(self, model: Model, machine: MachineView) -> str:
        """Say which starts, or which end, a start has to wait for; nothing where there are none."""
        if any(other.id == model.id and other.state not in GONE for other in self._others(model)):
            return "it waits until its engine of before has ended"
        starting = [other.id for other in self._others(model) if _starts(other)]
        num_most = self._fleet.settings.max_starting or max(machine.num_cores // CORES_EACH, 1)
        if len(starting) < num_most:
            return ""
        return f"it waits for the start of {names(starting)}: {num_most} may start at a time"

    def starting_on(self, model: Model, devices: Sequence[str]) -> list[str]:
        """Return which other models start on one of these devices."""
        there = set(devices)
        return [one.id for one in self._others(model) if _starts(one) and there & set(one.devices)]

    def awaited(
        self,
        model: Model,
        devices: Sequence[str],
        missing: Mapping[str, int],
        machine: MachineView,
    ) -> str:
        """Say what memory a model waits for that comes without anybody's being stopped for it.

        Args:
            model: Which one waits for memory.
            devices: Where it is, or is to be.
            missing: What it lacks, by place.
            machine: What was seen.

        Returns:
            Nothing where none is on its way, or none is missing.
        """
        if awaited := self._stops.givers.awaited(model.id, missing, machine):
            return awaited
        starting = self.starting_on(model, devices) if missing else []
        # When they are up, it is known what they take, and their weights may yield.
        return f"for the start of {names(starting)} on the same device" if starting else ""

    def _others(self, model: Model) -> list[Model]:
        return [other for other in self._fleet.all if other is not model]

    def _may_begin(self, model: Model, want: Want) -> bool:
        is_asked_by_name = want.cause is Cause.ORDER
        return model.state is State.COLD or (model.state is State.FAILED and is_asked_by_name)

    def _consider(
        self, want: Want, model: Model, machine: MachineView, now: float, place: Place
    ) -> bool:
        """Start one model, or see that it can later; say whether nobody else is to start now."""
        devices, why = place(model, machine)
        if hindrance := self._hindrance(model, devices, machine) if devices else why:
            self._wait(model, hindrance)
            return False
        room = self.rooms.of(model, devices, machine, now)
        missing = self._missing(want, model, devices, room.missing, now)
        if awaited := self.awaited(model, devices, missing, machine):
            self._wait(model, f"it waits {awaited}")
            if want.cause is not Cause.REQUEST or self._demands.waiting(model.id):
                self._claims |= dict.fromkeys(devices, model.id)
            return bool(self._stops.givers.of(model.id))
        if not missing:
            reason = want.reason
            if model.is_out_of_memory:
                reason += f", and its last start found too little memory; {room.sentence()}"
            self._decisions.add(
                model.id, "start", f"{reason}; {why}", needed=room.needed, free=room.free
            )
            self.forget(model.id)
            model.start(devices, reason)
            return True
        return self._make_room(want, model, devices, missing, now)

    def _make_room(
        self,
        want: Want,
        model: Model,
        devices: Sequence[str],
        missing: Mapping[str, int],
        now: float,
    ) -> bool:
        """Stop somebody for a start, if anybody may go; say whether nobody else is to start now."""
        if want.cause is Cause.AHEAD:
            self._wants.pop(model.id)
            self._wait(model, f"{want.reason}, but others would have to go")
            return False
        if want.cause is Cause.REQUEST and not self._demands.waiting(model.id):
            self._wait(model, "nobody waits for it any more")
            return False
        if self._stops.evict(model, devices, missing, now):
            return True
        self.lacks[model.id] = Lack(tuple(devices), missing)
        if self._holds.turn(model.id).held:
            self._claims |= dict.fromkeys((*devices, *missing), model.id)
        return False

    def _hindrance(self, model: Model, devices: Sequence[str], machine: MachineView) -> str:
        """Say why a start may not begin, whatever is free; nothing where it may."""
        claims = [self._claims[name] for name in (*devices, HOST_MEMORY) if name in self._claims]
        elder = f"{claims[0]!r} goes first" if claims else ""
        return self._holds.held(model.id) or self.passing(model, machine) or elder

    def _missing(
        self,
        want: Want,
        model: Model,
        devices: Sequence[str],
        missing: Mapping[str, int],
        now: float,
    ) -> Mapping[str, int]:
        """Return what has to be free before a start, beyond what is."""
        if missing or not model.is_out_of_memory or want.cause is Cause.AHEAD:
            return missing
        if self._stops.was_relieved(model):
            return missing
        # What was measured said that it fits, and it did not: somebody goes, whatever that gives.
        may_go = [one for one, _ in self._stops.ends(devices, now) if not one.is_pinned]
        for place in (*devices, HOST_MEMORY):
            if any(one.freed_bytes.get(place, 0) > 0 for one in may_go):
                return {place: 1}
        return missing

    def _wait(self, model: Model, reason: str, **inputs: Mapping[str, int]) -> None:
        self._decisions.add(model.id, "wait", reason, **inputs)


def _starts(model: Model) -> bool:
    """Whether an engine of ours comes up for it."""
    return model.state is State.STARTING and not model.settings.is_remote
