"""Models that come up before somebody asks: at their times, with companions, by habit."""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path

from kvcached_core import control
from kvcached_core.errors import KVCachedError
from kvcached_gateway.control.decisions import Decisions
from kvcached_gateway.control.demands import Demands
from kvcached_gateway.control.machine import HOST_MEMORY, MachineView
from kvcached_gateway.control.sizes import Sizes
from kvcached_gateway.control.wants import Cause, Want
from kvcached_gateway.models.model import Model
from kvcached_gateway.policy.prewarm import Prewarmable, Wish, wishes
from kvcached_gateway.settings.units import parse_warm_time
from kvcached_gateway.state import GONE, UP, State

__all__ = ["Prewarming"]

WAKE_SECONDS = 5.0


class Prewarming:
    """What brings models up that nobody waits for; into memory that evicts nobody.

    Args:
        models: Every model, by its name. Read at each call.
        directory: The folder of the ledgers.
        sizes: What models take.
        demands: Who is asked together.
        decisions: Where decisions are kept.
        moment: The time of the week, with its zone.
    """

    def __init__(
        self,
        models: Mapping[str, Model],
        directory: Path,
        sizes: Sizes,
        demands: Demands,
        decisions: Decisions,
        moment: Callable[[], datetime] = lambda: datetime.now().astimezone(),
    ) -> None:
        self._models = models
        self._directory = directory
        self._sizes = sizes
        self._demands = demands
        self._decisions = decisions
        self._moment = moment
        self._up_since: dict[str, float] = {}
        self._down_since: dict[str, float] = {}
        self._wakes: set[asyncio.Task[None]] = set()

    def changed(self, model: Model, before: State, after: State) -> None:
        """Take notice of a model's transition; one that moves has two objects, and stays up."""
        if self._models.get(model.id) is not model:
            return
        if after is State.STARTING or (before is State.YIELDED and after in UP):
            self._up_since[model.id] = model.since
        elif after in GONE or after is State.YIELDED:
            self._down_since[model.id] = model.since
            self._demands.habits.went_down(model.id, model.since)

    def wants(self, machine: MachineView, now: float) -> Iterator[Want]:
        """Wake who shall be awake, and yield who shall start.

        Args:
            machine: What there is.
            now: The loop's seconds.
        """
        found = wishes(
            now,
            self._moment(),
            [self._prewarmable(model, machine) for model in self._models.values()],
            self._demands.habits,
            _free(machine),
        )
        for wish in found.granted:
            model = self._models[wish.model]
            if model.state is State.YIELDED:
                self._follow(wish)
                self.wake(model)
            elif model.state is State.COLD:
                yield Want(model.id, Cause.AHEAD, wish.reason, now)

    def wake(self, model: Model) -> None:
        """Have a model's weights back before a request needs them."""
        task = asyncio.ensure_future(self._wake(model.settings.instance_name))
        self._wakes.add(task)
        task.add_done_callback(self._wakes.discard)

    def _follow(self, wish: Wish) -> None:
        self._demands.habits.woken(wish)
        self._decisions.add(wish.model, "wake", wish.reason)

    async def _wake(self, instance_name: str) -> None:
        try:
            await asyncio.to_thread(
                control.wake, instance_name, directory=self._directory, wait_seconds=WAKE_SECONDS
            )
        except KVCachedError as error:
            self._decisions.add(instance_name, "wake", f"it does not wake: {error}")

    def _prewarmable(self, model: Model, machine: MachineView) -> Prewarmable:
        is_yielded = model.state is State.YIELDED
        if is_yielded:
            needed = {
                name: sum(
                    view.weights_needed_bytes - view.weights_bytes
                    for view in machine.views(model.settings.instance_name, (name,))
                )
                for name in model.devices
            }
        else:
            names = model.devices or machine.devices
            devices = [machine.devices[name] for name in names if name in machine.devices]
            needed = self._sizes.needed_bytes(model.settings, devices)
        return Prewarmable(
            id=model.id,
            is_up=model.state not in {State.COLD, State.YIELDED},
            is_yielded=is_yielded,
            needed_bytes=needed,
            warm_at=tuple(map(parse_warm_time, model.settings.warm_at)),
            warm_with=model.settings.warm_with,
            up_since=self._up_since.get(model.id),
            down_since=self._down_since.get(model.id),
        )


def _free(machine: MachineView) -> dict[str, int]:
    """Return what nobody has, by place; of a device that nobody knows yet it is nothing."""
    devices = {name: device.free_bytes for name, device in machine.devices.items()}
    return devices | {HOST_MEMORY: machine.free_host_bytes}
