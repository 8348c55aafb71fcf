"""Which wanted models start now, where, and who has to be stopped for it."""

from collections.abc import Callable, Mapping, Sequence

from kvcached_gateway.control.decisions import Decisions
from kvcached_gateway.control.demands import Demands
from kvcached_gateway.control.machine import HOST_MEMORY, MachineView
from kvcached_gateway.control.rooms import Rooms
from kvcached_gateway.control.sizes import Sizes, kept_bytes
from kvcached_gateway.control.wants import Cause, Want
from kvcached_gateway.models.fleet import Fleet
from kvcached_gateway.models.model import Model
from kvcached_gateway.policy import eviction
from kvcached_gateway.state import GONE, UP, State

__all__ = ["Place", "Starts"]

# Says where a model belongs, and why; nowhere where it fits nowhere.
Place = Callable[[Model, MachineView], tuple[tuple[str, ...], str]]


class Starts:
    """The starts that are wanted, and the stops that they wait for.

    Args:
        fleet: The models.
        sizes: What models take.
        demands: What is asked of each.
        decisions: Where decisions are kept.
        is_pinned: Whether a model is never stopped for another.
    """

    def __init__(
        self,
        fleet: Fleet,
        sizes: Sizes,
        demands: Demands,
        decisions: Decisions,
        is_pinned: Callable[[Model], bool],
    ) -> None:
        self._fleet = fleet
        self._sizes = sizes
        self._demands = demands
        self._decisions = decisions
        self._is_pinned = is_pinned
        self._wants: dict[str, Want] = {}
        self._aging = eviction.Aging()
        # Who was stopped for whom, until they are gone.
        self._victims: dict[str, set[str]] = {}
        # Of models whose last start found too little memory: how many starts they had when somebody
        # was stopped for the next one.
        self._relieved: dict[str, int] = {}
        self.rooms = Rooms(fleet, sizes)

    @property
    def wants(self) -> Mapping[str, Want]:
        """What is wanted and has not begun."""
        return self._wants

    def want(self, want: Want) -> None:
        """Want a model up; the cause that counts more stands."""
        old = self._wants.get(want.model_id)
        if old is None or want.cause < old.cause:
            self._wants[want.model_id] = want

    def forget(self, model_id: str) -> None:
        """Want a model no longer."""
        self._wants.pop(model_id, None)
        self._victims.pop(model_id, None)
        self._decisions.forget_wait(model_id)

    def decide(self, machine: MachineView, now: float, place: Place) -> None:
        """Start one model, or stop those that have to go for one; the next look tells what is left.

        Args:
            machine: What there is.
            now: The loop's seconds.
            place: Says where a model belongs.
        """
        self._forget_victims()
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

    def passing(self, model: Model, devices: Sequence[str]) -> str:
        """Say which start or end a start has to wait for; nothing where there is none."""
        for other in self._fleet.all:
            if other is model:
                continue
            if other.state is State.STARTING and set(other.devices) & set(devices):
                return f"it waits for the start of {other.id!r} on the same device"
            if other.id == model.id and other.state not in GONE:
                return "it waits until its engine of before has ended"
        return ""

    def next_to_go(self, now: float) -> eviction.Eviction:
        """Return who would be stopped for some of the host's memory, and why others would not."""
        return self._choose(self._candidates((), now), {HOST_MEMORY: 1}, now)

    def may_not_go(self, model: Model) -> bool:
        """Whether a model is not to be stopped for another one, however old it is."""
        return self._is_busy(model) or self._stays(model)

    def _is_busy(self, model: Model) -> bool:
        return bool(model.num_leases or self._demands.waiting(model.id))

    def _stays(self, model: Model) -> bool:
        return self._is_pinned(model) or model.settings.when_idle == "stay"

    def _may_begin(self, model: Model, want: Want) -> bool:
        is_asked_by_name = want.cause is Cause.ORDER
        return model.state is State.COLD or (model.state is State.FAILED and is_asked_by_name)

    def _consider(
        self, want: Want, model: Model, machine: MachineView, now: float, place: Place
    ) -> bool:
        """Start one model, or see that it can later; say whether nobody else is to start now."""
        devices, why = place(model, machine)
        if hindrance := self.passing(model, devices) if devices else why:
            self._wait(model, hindrance)
            return False
        room = self.rooms.of(model, devices, machine, now)
        missing = self._missing(want, model, devices, room.missing, now)
        victims = self._victims.get(model.id, set())
        leaving = [other.id for other in self._fleet.all if self._leaves(other, victims)]
        if leaving and (missing or victims):
            self._wait(model, f"it waits until {_names(leaving)} gave back what they hold")
            return bool(victims)
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
        if want.cause is Cause.AHEAD:
            self._wants.pop(model.id)
            self._wait(model, f"{want.reason}, but others would have to go")
            return False
        if want.cause is Cause.REQUEST and not self._demands.waiting(model.id):
            self._wait(model, "nobody waits for it any more")
            return False
        return self._evict(model, devices, missing, now)

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
        if self._relieved.get(model.id) == model.num_starts:
            return missing
        # What was measured said that it fits, and it did not: somebody goes, whatever that gives.
        may_go = [one for one in self._candidates(devices, now) if not one.is_pinned]
        for place in (*devices, HOST_MEMORY):
            if any(one.freed_bytes.get(place, 0) > 0 for one in may_go):
                return {place: 1}
        return missing

    def _leaves(self, model: Model, victims: set[str]) -> bool:
        """Whether a model's memory is about to come back."""
        is_ending = model.state is State.DRAINING and not model.num_leases
        return is_ending or (model.id in victims and model.state not in GONE)

    def _forget_victims(self) -> None:
        gone = {model.id for model in self._fleet.all if model.state in GONE}
        there = self._fleet.models.keys() - gone
        left = {name: victims & there for name, victims in self._victims.items()}
        self._victims = {name: victims for name, victims in left.items() if victims}

    def _evict(
        self, model: Model, devices: Sequence[str], missing: Mapping[str, int], now: float
    ) -> bool:
        """Stop whoever is worth least, if that is enough; say whether somebody was."""
        chosen = self._choose(self._candidates(devices, now), missing, now)
        self._aging = chosen.state
        if not chosen.victims:
            self._wait(model, chosen.reason, missing=missing)
            return False
        self._relieved[model.id] = model.num_starts
        self._victims[model.id] = set(chosen.victims)
        self._wait(model, f"it waits until {_names(chosen.victims)} gave back what they hold")
        for name in chosen.victims:
            self._decisions.add(name, "stop", f"for {model.id!r}: {chosen.reason}", missing=missing)
            self._fleet.models[name].stop(f"{model.id!r} needs its memory")
        return True

    def _choose(
        self, candidates: Sequence[eviction.Candidate], missing: Mapping[str, int], now: float
    ) -> eviction.Eviction:
        settings = self._fleet.settings.memory
        return eviction.choose(candidates, missing, self._aging, settings, now, is_for_request=True)

    def _wait(self, model: Model, reason: str, **inputs: Mapping[str, int]) -> None:
        self._decisions.add(model.id, "wait", reason, **inputs)

    def _candidates(self, devices: Sequence[str], now: float) -> list[eviction.Candidate]:
        """Return every model that is up, and what its end gives back of some devices."""
        up = [model for model in self._fleet.models.values() if model.state in UP]
        return [
            self._candidate(model, devices, now) for model in up if not model.settings.is_remote
        ]

    def _candidate(self, model: Model, devices: Sequence[str], now: float) -> eviction.Candidate:
        settings, size = model.settings, self._sizes.of(model.id)
        freed = {HOST_MEMORY: size.process_bytes + self._sizes.copy_bytes(settings)}
        for name in set(model.devices) & set(devices):
            # What else an idle engine has yields anyway: it is in what is free.
            freed[name] = size.residue_bytes + kept_bytes(model.view)
            if settings.when_idle != "yield":
                freed[name] += self._sizes.weights_bytes(settings)
        service = self._fleet.settings.classes.get(settings.class_name or "")
        return eviction.Candidate(
            id=model.id,
            freed_bytes=freed,
            frequency=self._demands.of(model.id).frequency.at(now),
            start_seconds=model.start_seconds,
            is_busy=self._is_busy(model),
            is_pinned=self._stays(model),
            idle_seconds=now - model.last_used,
            warm_seconds=now - model.up_at,
            class_weight=1.0 if service is None else service.weight,
        )


def _names(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))
