"""Whose memory is on its way back: who was stopped for whom, who ends, who gave some just now."""

import math
from collections.abc import Iterable, Mapping

from kvcached_gateway.control.machine import MachineView
from kvcached_gateway.models.fleet import Fleet
from kvcached_gateway.models.model import Model
from kvcached_gateway.state import GONE, UP, State

__all__ = ["Givers", "names"]


class Givers:
    """Models that were stopped for others, until they are gone; and ends that nobody asked for.

    Args:
        fleet: The models.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._victims: dict[str, set[str]] = {}
        self._gone_at = -math.inf

    def of(self, model_id: str) -> set[str]:
        """Return who was stopped for a model and is not gone yet."""
        return self._victims.get(model_id, set())

    def stopped(self, model_id: str, victims: Iterable[str]) -> None:
        """Remember who was stopped for a model."""
        self._victims[model_id] = set(victims)

    def forget(self, model_id: str) -> None:
        """Wait for nobody any more in the place of a model."""
        self._victims.pop(model_id, None)

    def changed(self, model: Model, before: State, after: State, now: float) -> None:
        """Take notice of a transition: an engine that went, or one that stays after all."""
        if after in GONE:
            self._gone_at = now
        elif before is State.DRAINING and after in UP:
            self._drop({model.id})

    def forget_gone(self) -> None:
        """Wait no more for those that are gone."""
        there = {name for name, one in self._fleet.models.items() if one.state not in GONE}
        self._drop(set().union(*self._victims.values()) - there)

    def awaited(self, model_id: str, missing: Mapping[str, int], machine: MachineView) -> str:
        """Say whose memory is on its way to a model; nothing where none is, or none is missing.

        Args:
            model_id: Which one waits for memory.
            missing: What it lacks, by place.
            machine: What was seen.
        """
        victims = self.of(model_id)
        leaving = [other.id for other in self._fleet.all if _leaves(other, victims)]
        if leaving and (missing or victims):
            return f"until {names(leaving)} gave back what they hold"
        if missing and self._has_changed_since(machine, missing):
            return "until it is seen what was given back just now"
        return ""

    def _has_changed_since(self, machine: MachineView, missing: Mapping[str, int]) -> bool:
        """Whether somebody gave memory back after the look began, which may not have seen that."""
        at = machine.seen_at
        return self._gone_at > at or any(
            one.last_used > at and not one.num_leases and missing.keys() & set(one.devices)
            for one in self._fleet.all
        )

    def _drop(self, those: set[str]) -> None:
        left = {name: victims - those for name, victims in self._victims.items()}
        self._victims = {name: victims for name, victims in left.items() if victims}


def _leaves(model: Model, victims: set[str]) -> bool:
    """Whether a model's memory is about to come back."""
    is_ending = model.state is State.DRAINING and not model.num_leases
    return is_ending or (model.id in victims and model.state not in GONE)


def names(found: Iterable[str]) -> str:
    """Return some models' names for a sentence."""
    return ", ".join(map(repr, found))
