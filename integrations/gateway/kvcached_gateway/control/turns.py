"""Turns of models that are up and busy, where the weights of all of them have no room.

An engine gives its weights while nothing runs on it. Neighbours that always have a request would
keep a model from its own for ever: after a while they take no new ones until it has them.
"""

from collections.abc import Callable, Collection, Iterator

from kvcached_core.ledger.view import InstanceView
from kvcached_gateway.control.decisions import Decisions
from kvcached_gateway.control.givers import Givers
from kvcached_gateway.control.machine import MachineView
from kvcached_gateway.control.relief import missing_bytes
from kvcached_gateway.control.sizes import first_bytes, kept_bytes
from kvcached_gateway.control.weights_had import WeightsHad
from kvcached_gateway.models.fleet import Fleet
from kvcached_gateway.models.model import Model
from kvcached_gateway.policy.turns import NOBODY, Holder, Turn, Waiter, choose
from kvcached_gateway.state import UP, State

__all__ = ["Turns"]

# An engine that waits looks several times a second, and takes at once what there is.
TAKEN_SECONDS = 5.0


class Turns:
    """Who takes no new requests, and for whom.

    Args:
        fleet: The models.
        givers: Whose memory is on its way.
        decisions: Where decisions are kept.
        is_pinned: Whether a model never holds back.

    Attributes:
        on_end: Called with a model that takes requests again: `Line.changed`.
    """

    def __init__(
        self,
        fleet: Fleet,
        givers: Givers,
        decisions: Decisions,
        is_pinned: Callable[[Model], bool],
    ) -> None:
        self._fleet = fleet
        self._givers = givers
        self._decisions = decisions
        self._is_pinned = is_pinned
        self._had = WeightsHad()
        self._since: dict[str, float] = {}  # of each that waits
        self._turns: dict[str, Turn] = {}  # likewise
        self._idle_since: dict[str, float] = {}  # of all that hold back for it
        self._held: dict[str, str] = {}  # why
        self.on_end: Callable[[str], None] = _tell_nobody

    def held(self, model_id: str) -> str:
        """Return why a model takes no new requests; nothing where it does."""
        return self._held.get(model_id, "")

    def concern(self, model_id: str) -> bool:
        """Whether a model holds back, or others do for it."""
        return model_id in self._held or bool(self._turns.get(model_id, NOBODY).held)

    def decide(self, machine: MachineView, now: float) -> None:
        """Let models hold back for those that have waited, and go on where that is over.

        Args:
            machine: What there is.
            now: The loop's seconds.
        """
        self._look(now)
        held: dict[str, str] = {}
        for name in sorted(self._since, key=lambda each: (self._since[each], each)):
            turn = self._turn(self._fleet.models[name], machine, now, held)
            self._note(name, turn)
            held |= dict.fromkeys(turn.held, turn.reason)
        self._hold(held)

    def end(self) -> None:
        """Let all take requests again: nobody can see when a turn is over."""
        for name in self._turns:
            self._note(name, NOBODY)
        self._idle_since.clear()
        self._hold({})

    def _hold(self, held: dict[str, str]) -> None:
        before, self._held = self._held, held
        for name in before.keys() - held.keys():
            self.on_end(name)

    def _look(self, now: float) -> None:
        """Notice who waits, and since when each has its weights."""
        there = {
            model.id: model.view
            for model in self._fleet.models.values()
            if model.state in UP and model.view is not None
        }
        self._had.look(there, now)
        waiting = {name for name, view in there.items() if _waits(self._fleet.models[name], view)}
        for name in self._since.keys() - waiting:
            self._note(name, NOBODY)
            del self._since[name], self._turns[name]
            self._idle_since.pop(name, None)
        for name in waiting - self._since.keys():
            self._since[name], self._turns[name] = now, NOBODY

    def _turn(self, model: Model, machine: MachineView, now: float, taken: Collection[str]) -> Turn:
        """Return who holds back for one that waits, beside those that do for earlier ones."""
        before = self._turns[model.id]
        turn_seconds = self._fleet.settings.turn_seconds
        if not turn_seconds or self._is_left(model.id, before, now):
            return NOBODY
        missing = self._missing(model, machine, {*taken, *before.held})
        if not before.held and self._givers.awaited(model.id, missing, machine):
            return NOBODY
        holders = [
            self._holder(other, model, machine, now)
            for other in self._neighbours(model)
            if other.id not in taken and (other.id in before.held or self._keeps(other))
        ]
        waiter = Waiter(model.id, now - self._since[model.id], missing, _priority(model))
        turn = choose(waiter, holders, turn_seconds)
        return before if turn.held and turn.held == before.held else turn

    def _is_left(self, name: str, turn: Turn, now: float) -> bool:
        """Whether one that waits leaves what others give up; then it waits for a turn once more.

        It may lack something else, such as host memory for its copy, or what they have never comes.
        """
        models = [one for one in self._fleet.models.values() if one.id in turn.held]
        if not models or any(one.num_leases for one in models):
            self._idle_since.pop(name, None)
            return False
        if now - self._idle_since.setdefault(name, now) < TAKEN_SECONDS:
            return False
        del self._idle_since[name]
        self._since[name] = now
        for one in models:
            if one.view and one.view.weights_bytes and not one.view.weights_offered_bytes:
                self._had.gave_none(one.id)
        return True

    def _note(self, name: str, turn: Turn) -> None:
        """Keep what was decided for one that waits, and say it once."""
        before, self._turns[name] = self._turns[name], turn
        if turn.reason:
            self._decisions.add(name, "wait", turn.reason)
        elif before.reason:
            self._decisions.forget_wait(name)
        for each in set(turn.held) - set(before.held):
            self._decisions.add(each, "hold", turn.reason)

    def _neighbours(self, model: Model) -> Iterator[Model]:
        for other in self._fleet.models.values():
            if other is not model and other.state in UP and set(model.devices) & set(other.devices):
                yield other

    def _keeps(self, model: Model) -> bool:
        """Whether a model has weights that nobody gets while it has requests."""
        view = model.view
        if view is None or not model.num_leases or self._had.gives_none(model.id):
            return False
        return view.weights_bytes > 0 and not view.weights_offered_bytes

    def _holder(self, model: Model, waiter: Model, machine: MachineView, now: float) -> Holder:
        weights_bytes = {
            name: view.weights_bytes
            for name in waiter.devices
            for view in machine.views(model.settings.instance_name, (name,))
        }
        return Holder(
            id=model.id,
            weights_bytes=weights_bytes,
            had_seconds=self._had.seconds(model.id, now),
            priority=_priority(model),
            is_pinned=self._is_pinned(model),
            kept_seconds=self._had.kept_seconds(model.id),
            is_held=model.id in self._turns[waiter.id].held,
        )

    def _missing(self, model: Model, machine: MachineView, held: Collection[str]) -> dict[str, int]:
        """Return what a model lacks on its devices beyond what comes by itself."""
        models = [one for one in self._fleet.all if one.num_leases or one.id in held]
        busy = {one.settings.instance_name for one in models if one.id not in held}
        holding = {one.settings.instance_name for one in models if one.id in held}

        def given(view: InstanceView) -> int:
            """What it gives, or its requests have; not weights of those that hold back."""
            if view.name not in busy and view.name not in holding:
                return view.resident_bytes + view.promised_bytes - kept_bytes(view)
            offered_bytes = view.weights_offered_bytes if view.name in busy else 0
            return max(view.held_bytes - first_bytes(view), 0) + offered_bytes

        return missing_bytes(model, machine, given)


def _waits(model: Model, view: InstanceView) -> bool:
    """Whether a request waits for its engine's weights: one that computes has all, and keeps them.

    A client that reads slowly what was computed long ago waits for nothing.
    """
    is_away = view.weights_bytes < view.weights_needed_bytes or view.weights_offered_bytes > 0
    return model.state is State.BUSY and is_away and model.leases.are_waiting


def _priority(model: Model) -> int:
    return model.view.priority if model.view else 0


def _tell_nobody(_model_id: str) -> None:
    """Tell nobody: there is no line yet."""
