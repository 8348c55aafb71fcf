"""Whatever happens to a model, in any order: a lease means an engine, an end means none is left."""

import asyncio
from collections.abc import Awaitable
from typing import Any

from helpers.gateway_clock import SimulatedLoop
from helpers.gateway_ledger import row
from helpers.gateway_runner import FakeRunner, record_of
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvcached_gateway.errors import AdoptionError, EngineStartError
from kvcached_gateway.lease import Ask, Ending
from kvcached_gateway.line.grantor import Readiness
from kvcached_gateway.models.model import Model, State
from kvcached_gateway.settings.config import ModelSettings

UP = {State.WARM, State.BUSY, State.YIELDED}
GONE = {State.COLD, State.FAILED}
NUM_TURNS = 30
HOST = ("host",)


class ModelMachine(RuleBasedStateMachine):
    """One model, and everything that can happen to it."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = SimulatedLoop()
        self.told: list[tuple[State, State]] = []
        self.leases: list[Any] = []
        self.num_whole = 0
        self.run(self._begin())

    async def _begin(self) -> None:
        self.runner = FakeRunner()
        self.model = Model(ModelSettings(id="a", model="m", max_concurrent=3), self.runner)
        self.model.on_change.append(lambda _model, old, new, _why: self.told.append((old, new)))

    def run(self, work: Awaitable[None] | None = None) -> None:
        async def turns() -> None:
            if work is not None:
                await work
            for _ in range(NUM_TURNS):
                await asyncio.sleep(0)

        self.loop.run_until_complete(turns())

    @rule()
    def want(self) -> None:
        self.model.start(HOST, "a request waits")
        self.run()

    @rule()
    def adopt(self) -> None:
        self.model.adopt(record_of())
        self.run()

    @rule(drain=st.sampled_from([None, 0.0, 5.0]))
    def stop(self, drain: float | None) -> None:
        self.model.stop("memory is needed", drain_seconds=drain)
        self.run()

    @rule(is_begun=st.booleans())
    def stop_at_once(self, is_begun: bool) -> None:  # noqa: FBT001  hypothesis passes it by name
        """No engine ends whose answer began before that; one that has none yet gets none."""
        alive = self.runner.alive
        was_up = self.model.state in UP and bool(self.model.num_leases)
        self.model.stop("another waits for it", is_at_once=True)
        held = [lease for lease in self.leases if lease.is_held]
        if is_begun and held:
            held[0].first_byte()
        has_begun = was_up and any(lease.has_first_byte for lease in held)
        self.run()
        if has_begun and not alive[0].crashed.is_set():
            assert self.runner.alive == alive
            assert held[0].is_held
        for lease in held:
            assert lease.is_held or lease.has_first_byte or not lease.first_byte()

    @precondition(lambda self: self.runner.coming)
    @rule(end_seconds=st.sampled_from([0.0, 3.0]))
    def come_up(self, end_seconds: float) -> None:
        self.runner.succeed(end_seconds)
        self.run()

    @precondition(lambda self: self.runner.coming)
    @rule(is_short=st.booleans())
    def fail(self, is_short: bool) -> None:  # noqa: FBT001  hypothesis passes it by name
        self.runner.fail(EngineStartError("it cannot", is_out_of_memory=is_short))
        self.run()

    @precondition(lambda self: self.runner.coming)
    @rule()
    def refuse_adoption(self) -> None:
        self.runner.fail(AdoptionError("another process has its number"))
        self.run()

    @rule(waited=st.sampled_from([0.0, 2.0]))
    def ask(self, waited: float) -> None:
        lease = self.model.grant(Ask("a", "/v1/completions", 10), waited)
        if lease is not None:
            assert self.model.state is State.BUSY
            self.leases.append(lease)

    @precondition(lambda self: self.leases)
    @rule(number=st.integers(0, 99), ending=st.sampled_from(Ending))
    def give_back(self, number: int, ending: Ending) -> None:
        lease = self.leases.pop(number % len(self.leases))
        lease.first_byte()
        lease.end(ending)
        lease.end(ending)  # a second call does nothing
        self.run()

    @precondition(lambda self: self.runner.alive)
    @rule()
    def crash(self) -> None:
        """The first process ends; what is left of the engine is for the model to end."""
        self.runner.alive[0].crashed.set()
        self.run()

    @precondition(lambda self: self.runner.alive)
    @rule(is_well=st.booleans())
    def fall_silent(self, is_well: bool) -> None:  # noqa: FBT001  hypothesis passes it by name
        self.runner.alive[0].is_well = is_well

    @precondition(lambda self: self.runner.alive)
    @rule(num_running=st.integers(0, 1), num_tokens=st.integers(0, 2))
    def count(self, num_running: int, num_tokens: int) -> None:
        engine = self.runner.alive[0]
        engine.num_running, engine.num_tokens = num_running, engine.num_tokens + num_tokens

    @rule(bytes_there=st.sampled_from([0, 8]), waiting=st.sampled_from([0, 5]))
    def observe(self, bytes_there: int, waiting: int) -> None:
        view = row(weights_bytes=bytes_there, weights_needed_bytes=8, waiting_bytes=waiting)
        self.model.observed(view)

    @rule(seconds=st.sampled_from([0.5, 6.0, 70.0, 400.0]))
    def wait(self, seconds: float) -> None:
        self.run(asyncio.sleep(seconds))

    @invariant()
    def a_lease_means_an_engine(self) -> None:
        held = [lease for lease in self.leases if lease.is_held]
        assert len(held) == self.model.num_leases
        if held:
            assert self.model.state in {State.BUSY, State.DRAINING}
            assert len(self.runner.alive) == 1
            assert not self.runner.alive[0].crashed.is_set()

    @invariant()
    def the_end_leaves_nothing(self) -> None:
        if self.model.state in GONE:
            assert not self.runner.alive
            assert not self.runner.coming
            assert self.model.num_leases == 0
            assert self.model.engine is None
            assert not self.model.devices

    @invariant()
    def one_engine_at_a_time(self) -> None:
        assert len(self.runner.alive) + len(self.runner.coming) <= 1
        assert bool(self.runner.coming) == (self.model.state is State.STARTING)

    @invariant()
    def busy_means_that_somebody_asks(self) -> None:
        if self.model.state in UP:
            assert self.model.engine is not None
            assert (self.model.state is State.BUSY) == bool(self.model.num_leases)

    @invariant()
    def what_the_line_sees_fits(self) -> None:
        assert (self.model.readiness is Readiness.UP) == (self.model.state in UP)
        refusal = self.model.refusal()
        assert (refusal is not None) == (self.model.state is State.FAILED)

    @invariant()
    def every_transition_is_told(self) -> None:
        states = [State.COLD, *(new for _, new in self.told)]
        assert states[-1] is self.model.state
        assert [old for old, _ in self.told] == states[:-1]

    def teardown(self) -> None:
        try:
            self.end()
        finally:
            self.loop.close()

    def end(self) -> None:
        for engine in self.runner.alive:
            engine.is_well = True
        self.run(self.model.close(is_kept=False, drain_seconds=1.0))
        assert self.model.state is State.COLD
        assert not self.runner.alive
        assert not self.runner.coming
        assert self.model.num_leases == 0
        assert not asyncio.all_tasks(self.loop)


TestModelMachine = ModelMachine.TestCase
