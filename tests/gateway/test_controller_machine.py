"""Whatever is asked, starts, fails and goes: nobody is stopped in vain, and whoever waits knows."""

import asyncio
import math
import shutil
import tempfile
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

from helpers.gateway_clock import SimulatedLoop
from helpers.gateway_fleet import Takes, World
from hypothesis import settings as profile
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvcached_gateway.errors import RefusedError
from kvcached_gateway.lease import Ending, Lease
from kvcached_gateway.models.model import Model
from kvcached_gateway.state import UP, State

MODELS = {
    "a": Takes(process=4, residue=2, weights=30),
    "b": Takes(process=4, residue=2, weights=30),
    "c": Takes(process=8, residue=20, weights=30),
    "pinned": Takes(process=4, residue=2, weights=10),
    "kept": Takes(process=2, residue=2, weights=10),
    "near": Takes(process=2, residue=2, weights=5),
}
NAMES = st.sampled_from(sorted(MODELS))
MIN_WARM_SECONDS = 20.0
STARTS_APART_SECONDS = 60.0
MAX_STARTING = 3


class ControllerMachine(RuleBasedStateMachine):
    """A controller over six models on two devices, where three or four fit."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = SimulatedLoop()
        self.folder = Path(tempfile.mkdtemp())
        self.waiting: list[asyncio.Task[Lease]] = []
        self.held: list[Lease] = []
        self.wrong: list[str] = []
        self.began: dict[str, float] = {}
        self.ordered: dict[str, float] = {}
        self.run(self._begin())

    async def _begin(self) -> None:
        self.world = World(
            self.folder,
            MODELS,
            devices={"one": 60, "two": 60},
            host=100,
            num_cores=12,
            settings={
                "pinned": {"pin": True},
                "kept": {"when_idle": "stop", "idle_limit_seconds": 120.0},
                "near": {"devices": ("two",), "max_wait_seconds": 60.0},
            },
        )
        self.world.fleet.on_change.append(self._see)

    def _see(self, model: Model, before: State, after: State, reason: str) -> None:
        """Whoever is stopped for a start is idle, old enough and not pinned.

        One that is up may have a busy one stopped, if each waits for the other.
        """
        now = self.loop.time()
        if after is State.STARTING:
            self.began[model.id] = now
            self._see_start(model)
        is_asked = self.world.line.waiting(model.id)
        if after is State.DRAINING and "idle_limit" in reason and is_asked:
            self.wrong.append(f"requests wait for {model.id}")
        if after is not State.DRAINING or "needs its memory" not in reason:
            return
        other = reason.split("'")[1]
        is_for_start = self.world[other].state not in UP
        if is_for_start and is_asked and model.id not in self._held_for(other):
            self.wrong.append(f"requests wait for {model.id}, and it did not hold back")
        if is_for_start and (before is State.BUSY or model.num_leases):
            self.wrong.append(f"{model.id} was busy")
        if model.settings.pin:
            self.wrong.append(f"{model.id} is pinned")
        if now - model.up_at < MIN_WARM_SECONDS:
            self.wrong.append(f"{model.id} was young")
        if now - self.began[model.id] < STARTS_APART_SECONDS:
            self.wrong.append(f"{model.id} could start twice in a minute")

    def _held_for(self, name: str) -> tuple[str, ...]:
        """Return who holds back for a model for which somebody waits."""
        turn = self.world.controller._holds.turn(name)
        return turn.held if self._is_waited_for(name) else ()

    def _is_waited_for(self, name: str) -> bool:
        """Whether requests wait for a model, or it was ordered no longer ago than they may."""
        ordered_seconds = self.loop.time() - self.ordered.get(name, -math.inf)
        is_ordered = ordered_seconds < self.world[name].settings.max_wait_seconds
        return is_ordered or bool(self.world.line.waiting(name))

    def _see_start(self, model: Model) -> None:
        """Whoever starts beside other starts fits with all that is known of them."""
        machine, sizes = self.world.look(), self.world.controller._sizes
        starting = [one for one in self.world.fleet.all if one.state is State.STARTING]
        if len(starting) > MAX_STARTING:
            self.wrong.append(f"{len(starting)} start at a time")
        for name in model.devices:
            here = [one for one in starting if name in one.devices]
            device = machine.devices[name]
            needed = sum(sizes.device_bytes(one.settings, device) for one in here)
            if len(here) > 1 and needed > (device.capacity_bytes or 0):
                self.wrong.append(f"{[one.id for one in here]} do not fit together")

    def run(self, work: Awaitable[Any]) -> None:
        async def turns() -> None:
            await work
            for _ in range(30):
                await asyncio.sleep(0)

        self.loop.run_until_complete(turns())
        for task in [task for task in self.waiting if task.done()]:
            self.waiting.remove(task)
            if task.cancelled():
                continue
            if (error := task.exception()) is None:
                self.held.append(task.result())
            else:
                assert isinstance(error, RefusedError)
                assert error.message

    @rule(name=NAMES)
    def ask(self, name: str) -> None:
        async def begin() -> None:
            self.waiting.append(self.world.ask(name))

        self.run(begin())

    @rule()
    def tick(self) -> None:
        self.run(self.world.tick())
        self._see_turns()

    def _see_turns(self) -> None:
        """Whoever holds back is not pinned, and does it once, for one for which somebody waits."""
        held = []
        for waiter, turn in self.world.controller._holds.turns.items():
            held += turn.held
            if turn.held and not (self._is_waited_for(waiter) or self.world[waiter].num_leases):
                self.wrong.append(f"{turn.held} hold back for {waiter}, which nobody asks")
        if len(held) > len(set(held)) or "pinned" in held:
            self.wrong.append(f"{held} hold back")

    @rule(names=st.lists(NAMES, min_size=2, max_size=4, unique=True))
    def be_busy_for_long(self, names: list[str]) -> None:
        """Ask models all the time, for longer than two turns."""
        for name in names:
            self.ask(name)
        for _ in range(5):
            self.wait(6.0)
            self.tick()

    @precondition(lambda self: self.world.engines.coming)
    @rule()
    def come_up(self) -> None:
        self.run(self.world.come(next(iter(self.world.engines.coming))))

    @precondition(lambda self: self.world.engines.coming)
    @rule(is_short=st.booleans())
    def fail(self, is_short: bool) -> None:  # noqa: FBT001  hypothesis passes it by name
        name = next(iter(self.world.engines.coming))
        self.run(self.world.fail(name, is_out_of_memory=is_short))

    @precondition(lambda self: self.held)
    @rule(number=st.integers(0, 99))
    def give_back(self, number: int) -> None:
        self.held.pop(number % len(self.held)).end(Ending.DONE)
        self.run(asyncio.sleep(0))

    @precondition(lambda self: self.waiting)
    @rule(number=st.integers(0, 99))
    def leave(self, number: int) -> None:
        self.waiting[number % len(self.waiting)].cancel()
        self.run(asyncio.sleep(0))

    @rule(name=NAMES)
    def yield_weights(self, name: str) -> None:
        if not self.world[name].num_leases and self.world[name].settings.when_idle == "yield":
            self.world.yielded ^= {name}

    @rule(name=NAMES)
    def stop(self, name: str) -> None:
        self.world[name].stop("somebody said so")
        self.run(asyncio.sleep(0))

    @rule(name=NAMES)
    def warm(self, name: str) -> None:
        if self.world[name].state not in UP:
            self.world.controller.warm(name)
            self.ordered[name] = self.loop.time()

    @rule(seconds=st.sampled_from([1.0, 30.0, 200.0]))
    def wait(self, seconds: float) -> None:
        self.run(asyncio.sleep(seconds))

    @invariant()
    def nobody_is_stopped_who_may_not_be(self) -> None:
        assert not self.wrong

    @invariant()
    def engines_are_where_the_file_lets_them_be(self) -> None:
        assert all(
            devices == ("two",) for name, devices in self.world.engines.begun if name == "near"
        )

    def teardown(self) -> None:
        try:
            self.come_to_rest()
            self.run(self.world.close())
            assert not asyncio.all_tasks(self.loop)
        finally:
            self.loop.close()
            shutil.rmtree(self.folder)

    def come_to_rest(self) -> None:
        """Whoever is asked when everything is idle starts, or it is said what it waits for."""
        for lease in self.held:
            lease.end(Ending.DONE)
        self.held.clear()
        for task in self.waiting:
            task.cancel()
        self.run(asyncio.sleep(400))
        for name in MODELS:
            self.ask(name)
            for _ in range(8):
                self.tick()
                while self.world.engines.coming:
                    self.come_up()
                    self.tick()
                if self.held:
                    break
                if self.waiting:
                    assert self.world.waits_for(name)
                self.run(asyncio.sleep(45))
            assert self.held, (name, self.world.states, self.world.waits_for(name))
            self.held.pop().end(Ending.DONE)
            self.run(asyncio.sleep(100))


ControllerMachine.TestCase.settings = profile(
    max_examples=20, stateful_step_count=30, deadline=None
)
TestControllerMachine = ControllerMachine.TestCase
