"""Models that are up, and whose requests wait for their weights: what they lack, and who has it."""

from collections.abc import Collection, Iterator

from kvcached_core.ledger.view import InstanceView
from kvcached_gateway.control.machine import MachineView
from kvcached_gateway.control.relief import missing_bytes
from kvcached_gateway.control.sizes import first_bytes, kept_bytes
from kvcached_gateway.control.weights_had import WeightsHad
from kvcached_gateway.models.fleet import Fleet
from kvcached_gateway.models.model import Model
from kvcached_gateway.state import UP, State

__all__ = ["Wakes"]


class Wakes:
    """Wakes that neighbours hold up which always have requests.

    Args:
        fleet: The models.
        had: What is known of their weights.
    """

    def __init__(self, fleet: Fleet, had: WeightsHad) -> None:
        self._fleet = fleet
        self._had = had

    def waiting(self) -> set[str]:
        """Return whose requests wait for their engine's weights."""
        return {name for name, model in self._fleet.models.items() if _waits(model)}

    def missing(self, model: Model, machine: MachineView, held: Collection[str]) -> dict[str, int]:
        """Return what a model lacks on its devices beyond what comes by itself, in bytes.

        Args:
            model: Which one waits.
            machine: What there is.
            held: Who holds back, for it or for others.
        """
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

    def given(
        self, model: Model, machine: MachineView, before: Collection[str]
    ) -> dict[str, dict[str, int]]:
        """Return what each neighbour has of a model's devices that holding back would give.

        Args:
            model: Which one waits.
            machine: What there is.
            before: Who holds back for it already.
        """
        return {
            other.id: {
                name: view.weights_bytes
                for name in model.devices
                for view in machine.views(other.settings.instance_name, (name,))
            }
            for other in self._neighbours(model)
            if other.id in before or self._keeps(other)
        }

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


def _waits(model: Model) -> bool:
    """Whether a request waits for its engine's weights: one that computes has all, and keeps them.

    A client that reads slowly what was computed long ago waits for nothing.
    """
    view = model.view
    if view is None or model.state is not State.BUSY:
        return False
    is_away = view.weights_bytes < view.weights_needed_bytes or view.weights_offered_bytes > 0
    return is_away and model.leases.are_waiting
