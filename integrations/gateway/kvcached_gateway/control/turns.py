"""Turns of models whose requests wait for room that neighbours have which always have requests.

An engine gives its weights while nothing runs on it, and one that is busy is not stopped. So
neighbours that always have a request would keep a model from its weights, or from its start, for
ever: after a while they take no new ones until it has its memory.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from kvcached_gateway.control.decisions import Decisions
from kvcached_gateway.control.demands import Demands
from kvcached_gateway.control.holds import Holds
from kvcached_gateway.control.machine import MachineView
from kvcached_gateway.control.short_starts import ShortStarts
from kvcached_gateway.control.starts import Starts
from kvcached_gateway.control.stops import Stops
from kvcached_gateway.control.wakes import Wakes
from kvcached_gateway.control.weights_had import WeightsHad
from kvcached_gateway.models.fleet import Fleet
from kvcached_gateway.models.model import Model
from kvcached_gateway.policy.turns import NOBODY, Holder, Turn, Waiter, choose
from kvcached_gateway.state import UP

__all__ = ["Turns"]

# An engine that waits looks several times a second, and takes at once what there is.
TAKEN_SECONDS = 5.0


@dataclass
class _Wait:
    """A model that waits.

    Attributes:
        is_start: Whether it has to start.
        since: Since when it waits, by the loop's clock.
        idle_since: Since when all are idle that hold back for it; None where not all are.
    """

    is_start: bool
    since: float
    idle_since: float | None = None


class Turns:
    """Who takes no new requests, and for whom.

    Args:
        fleet: The models.
        starts: What is wanted, and what it lacks.
        stops: Who may be stopped for it, and whose memory is on its way.
        demands: Whose requests wait.
        decisions: Where decisions are kept.
        is_pinned: Whether a model never holds back.
        holds: Where it is kept who does.

    Attributes:
        on_end: Called with a model that takes requests again: `Line.changed`.
    """

    def __init__(
        self,
        fleet: Fleet,
        starts: Starts,
        stops: Stops,
        demands: Demands,
        decisions: Decisions,
        is_pinned: Callable[[Model], bool],
        holds: Holds,
    ) -> None:
        self._fleet = fleet
        self._starts = starts
        self._givers = stops.givers
        self._decisions = decisions
        self._is_pinned = is_pinned
        self._holds = holds
        self._had = WeightsHad()
        self._wakes = Wakes(fleet, self._had)
        self._short = ShortStarts(fleet, starts, stops, demands, self._had)
        self._waits: dict[str, _Wait] = {}
        self.on_end: Callable[[str], None] = _tell_nobody

    def concern(self, model_id: str) -> bool:
        """Whether a model holds back, or others do for it."""
        return bool(self._holds.held(model_id) or self._holds.turn(model_id).held)

    def look(self, machine: MachineView, now: float) -> None:
        """Notice who waits, and let models go on that hold back for those that do no more.

        It comes before anybody is stopped: who holds back may be, though requests wait for it.

        Args:
            machine: What there is.
            now: The loop's seconds.
        """
        before = self._holds.names
        self._notice(machine, now)
        self._tell(before)

    def decide(self, machine: MachineView, now: float) -> None:
        """Let models hold back for those that have waited, and go on where that is over.

        Args:
            machine: What there is.
            now: The loop's seconds.
        """
        before = self._holds.names
        taken: set[str] = set()
        for name in sorted(self._waits, key=lambda each: (self._waits[each].since, each)):
            turn = self._turn(self._fleet.models[name], machine, now, taken)
            self._note(name, turn)
            taken |= set(turn.held)
        self._tell(before)

    def end(self) -> None:
        """Let all take requests again: nobody can see when a turn is over."""
        before = self._holds.names
        for name, wait in self._waits.items():
            self._note(name, NOBODY)
            wait.idle_since = None
        self._tell(before)

    def _tell(self, before: set[str]) -> None:
        """Tell of all that held back before, and do no more."""
        for name in before - self._holds.names:
            self.on_end(name)

    def _notice(self, machine: MachineView, now: float) -> None:
        """Notice who waits, and since when each has its weights."""
        there = {
            model.id: model.view
            for model in self._fleet.models.values()
            if model.state in UP and model.view is not None
        }
        self._had.look(there, now)
        before = [name for name in self._waits if self._holds.turn(name).held]
        waiting = dict.fromkeys(self._short.waiting(machine, before, now), True)
        waiting |= dict.fromkeys(self._wakes.waiting(), False)
        for name in list(self._waits):
            if waiting.get(name) is not self._waits[name].is_start:
                self._note(name, NOBODY)
                del self._waits[name], self._holds.turns[name]
        for name in waiting.keys() - self._waits.keys():
            self._waits[name] = _Wait(waiting[name], now)

    def _turn(self, model: Model, machine: MachineView, now: float, taken: Collection[str]) -> Turn:
        """Return who holds back for one that waits, beside those that do for earlier ones."""
        before = self._holds.turn(model.id)
        turn_seconds = self._fleet.settings.turn_seconds
        if not turn_seconds or self._is_left(model, before, now):
            return NOBODY
        held = {*taken, *before.held}
        given: list[Mapping[str, Mapping[str, int]]]
        if self._waits[model.id].is_start:
            missing = self._short.missing(model, held, now)
            given = self._short.given(model, machine, before.held, now)
        else:
            missing = self._wakes.missing(model, machine, held)
            given = [self._wakes.given(model, machine, before.held)]
        if not before.held and self._givers.awaited(model.id, missing, machine):
            return NOBODY
        waiter = Waiter(model.id, now - self._waits[model.id].since, missing, model.priority)
        turns = [
            choose(waiter, self._holders(each, before, taken, now), turn_seconds) for each in given
        ]
        if before.held and any(turn.held == before.held for turn in turns):
            return before
        return next((turn for turn in turns if turn.held), turns[-1])

    def _is_left(self, model: Model, turn: Turn, now: float) -> bool:
        """Whether one that waits leaves what others give up; then it waits for a turn once more.

        It may lack something else, such as host memory for its copy, or what they have never comes.
        """
        wait = self._waits[model.id]
        models = [one for one in self._fleet.models.values() if one.id in turn.held]
        is_served = wait.is_start and self._short.is_served(model)
        if not models or is_served or any(one.num_leases for one in models):
            wait.idle_since = None
            return False
        if wait.idle_since is None:
            wait.idle_since = now
        if now - wait.idle_since < TAKEN_SECONDS:
            return False
        wait.idle_since, wait.since = None, now
        for one in models:
            if one.view and one.view.weights_bytes and not one.view.weights_offered_bytes:
                self._had.gave_none(one.id)
        return True

    def _note(self, name: str, turn: Turn) -> None:
        """Keep what was decided for one that waits, and say it once."""
        before, self._holds.turns[name] = self._holds.turn(name), turn
        is_said = name in self._starts.wants  # with the rest that it waits for
        if turn.reason and not is_said:
            self._decisions.add(name, "wait", turn.reason)
        elif before.reason and not is_said:
            self._decisions.forget_wait(name)
        for each in set(turn.held) - set(before.held):
            self._decisions.add(each, "hold", turn.reason)

    def _holders(
        self,
        given: Mapping[str, Mapping[str, int]],
        before: Turn,
        taken: Collection[str],
        now: float,
    ) -> list[Holder]:
        """Return who may hold back: all that give something, and do not for somebody else."""
        models = [self._fleet.models[name] for name in given if name not in taken]
        return [
            Holder(
                id=model.id,
                given_bytes=given[model.id],
                had_seconds=self._had.seconds(model.id, now),
                priority=model.priority,
                is_pinned=self._is_pinned(model),
                kept_seconds=self._had.kept_seconds(model.id),
                is_held=model.id in before.held,
            )
            for model in models
        ]


def _tell_nobody(_model_id: str) -> None:
    """Tell nobody: there is no line yet."""
