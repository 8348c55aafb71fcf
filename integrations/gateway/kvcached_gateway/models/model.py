"""One model: whether its engine runs, who holds leases on it, and what it does next.

Whoever wants something of a model says so and goes on: the model's own task does it (`life`).
Leases alone are granted and given back at once, on the loop's thread.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace

from kvcached_core.ledger.view import InstanceView
from kvcached_gateway.engines.state_file import EngineRecord
from kvcached_gateway.errors import LEAST_RETRY_SECONDS, RefusedError
from kvcached_gateway.lease import Ask, Ending, Woken
from kvcached_gateway.line.grantor import Readiness
from kvcached_gateway.models.adapters import Adapters
from kvcached_gateway.models.held_leases import HeldLeases, ModelLease
from kvcached_gateway.models.life import Life
from kvcached_gateway.models.protocols import EngineRunner, RunningEngine
from kvcached_gateway.models.watch import Patience, well_again
from kvcached_gateway.models.wishes import Begin, End
from kvcached_gateway.policy.demand import Mean
from kvcached_gateway.settings.config import ModelSettings
from kvcached_gateway.state import PASSING, UP, State

__all__ = ["Model", "State"]

Changed = Callable[["Model", State, State, str], None]


class Model:
    """One model of the file, which is also a `grantor.Grantor`. Made on the loop.

    Args:
        settings: Its part of the file.
        runner: What starts its engine.
        adapters: The folders of its adapters, by each name that a client may write.
        patience: How long its engine is waited for.

    Attributes:
        state: What it does; see `State`.
        since: When that began, by the loop's clock.
        reason: Why it did, as a sentence.
        engine: Its engine, while there is one that answered.
        devices: Where it runs, or is about to; nothing while it is cold.
        failure: Why it failed the last time; nothing after a start that did not.
        is_out_of_memory: Whether that was for want of memory.
        next_try_at: Until when it is failed.
        starts: What a start takes.
        last_used: When it had a request the last time.
        up_at: Since when its engine serves.
        last_start_seconds: What the last one took; None of an engine that was adopted.
        num_starts: How often an engine of it was started; an adoption is none.
        token: What it answers to the known question.
        view: What the ledger said of it the last time.
        on_change: Called after each transition, with both states and the reason.
        on_lease: Called when a lease began to be answered or came back, and when an adapter came.
    """

    def __init__(
        self,
        settings: ModelSettings,
        runner: EngineRunner,
        adapters: Mapping[str, str] | None = None,
        patience: Patience | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._clock = self._loop.time
        self.settings = settings
        self.adapter_folders = dict(adapters or {})
        self.state = State.COLD
        self.since = self.last_used = self._clock()
        self.reason = "nobody asked for it yet"
        self.engine: RunningEngine | None = None
        self.devices: tuple[str, ...] = ()
        self.failure = ""
        self.is_out_of_memory = False
        self.next_try_at = 0.0
        self.starts = Mean()
        self.last_start_seconds: float | None = None
        self.num_starts = 0
        self.token = ""
        self.view: InstanceView | None = None
        self.on_change: list[Changed] = []
        self.on_lease: list[Callable[[Model], None]] = []
        self.leases = HeldLeases(self._on_lease)
        self._adapters: Adapters | None = None
        self.up_at = 0.0
        self._doubt: asyncio.Task[None] | None = None  # while nobody knows whether its engine lives
        self._patience = patience or Patience()
        self._life = Life(self, runner, self._patience)

    @property
    def id(self) -> str:
        """Its name in the file."""
        return self.settings.id

    @property
    def start_seconds(self) -> float:
        """What a start takes, a mean; 0 before the first."""
        return self.starts.value or 0.0

    @property
    def priority(self) -> int:
        """Its priority in the ledger; before it has a row there, what the file says."""
        return self.view.priority if self.view else self.settings.kv.priority or 0

    @property
    def num_leases(self) -> int:
        """How many requests its engine has."""
        return len(self.leases)

    @property
    def readiness(self) -> Readiness:
        """What a request may expect of it."""
        if self.state in UP:
            return Readiness.UP
        is_coming = self.state in PASSING or self._life.is_wanted
        return Readiness.COMING if is_coming else Readiness.COLD

    @property
    def adapters(self) -> tuple[str, ...]:
        """The adapters that its engine has, the least used first."""
        return () if self._adapters is None else self._adapters.loaded

    def grant(self, ask: Ask, waited_seconds: float) -> ModelLease | None:
        """Return a lease, or None: not now."""
        if self.engine is None or self.state not in UP or self._life.is_told_to_end:
            return None
        if self._doubt is not None:
            return None
        most = self.settings.max_concurrent
        if most is not None and self.num_leases >= most:
            return None
        folder = self.adapter_folders.get(ask.model)
        if folder is None and not self.engine.serves(ask.model):
            return None  # a reload gave it the name; it starts again when it is idle
        if folder and self._adapters and not self._adapters.may_ask(ask.model, folder):
            return None
        woken = Woken.NONE
        if self.state is State.YIELDED:
            woken = Woken.WAKE
        elif waited_seconds and self._clock() - waited_seconds <= self.up_at:
            woken = Woken.START
        adapter = None if folder is None else ask.model
        lease = self.leases.give(self.id, self.engine.address, woken, waited_seconds, adapter)
        self.last_used = self._clock()
        if self.state is not State.BUSY:
            self.go(State.BUSY, "it has requests")
        return lease

    def may_go_past(self, ask: Ask) -> frozenset[str]:
        """Return the names whose requests need not wait behind one that waits for its adapter."""
        adapters, name = self._adapters, ask.model
        if adapters is None or name not in self.adapter_folders or name in adapters.loaded:
            return frozenset()
        beside = adapters.loaded if adapters.is_loading(name) else ()
        return frozenset((self.id, *self.settings.aliases, *beside))

    def refusal(self) -> RefusedError | None:
        """Return why nothing will come of a request, in a new error; None where it may."""
        if self.state is not State.FAILED:
            return None
        seconds = max(self.next_try_at - self._clock(), LEAST_RETRY_SECONDS)
        # The lines behind the first are of a log: the operator's business.
        why = self.failure.partition("\n")[0]
        return RefusedError(503, "model_failed", f"{self.id!r}: {why}", retry_after_seconds=seconds)

    def start(self, devices: tuple[str, ...], reason: str) -> None:
        """Start its engine on some devices, unless it has one; also where it failed before."""
        self._life.begin(Begin(devices, reason))

    def adopt(self, record: EngineRecord) -> None:
        """Take over the engine that an earlier gateway left, or end it."""
        self._life.begin(Begin(record.devices, "an earlier gateway left its engine", record))

    def stop(
        self, reason: str, *, drain_seconds: float | None = None, is_at_once: bool = False
    ) -> None:
        """Give no more leases, and end its engine when the last is back, or after some seconds.

        Args:
            reason: Why, as a sentence.
            drain_seconds: How long leases are waited for; None is until the last.
            is_at_once: Whether none is waited for: requests without an answer are asked again.
        """
        self._life.end(End(reason, drain_seconds, is_at_once=is_at_once))

    async def close(self, *, is_kept: bool, drain_seconds: float | None = 0.0) -> None:
        """Do nothing any more: its engine is drained and ended, or left alive for a later gateway.

        Args:
            is_kept: Whether it is left alive.
            drain_seconds: How long leases are waited for; None is until the last.
        """
        await self._life.close(End("the gateway ends", drain_seconds, is_kept=is_kept))

    async def settled(self) -> None:
        """Wait until nothing that was asked of it is still to be done."""
        await self._life.settled()

    def set_settings(
        self, settings: ModelSettings, adapters: Mapping[str, str] | None = None
    ) -> None:
        """Go by new settings; an engine that runs stays as it was started."""
        self.settings = settings
        self.adapter_folders = dict(adapters or {})
        self._tell_lease()

    def observed(self, view: InstanceView | None) -> None:
        """Say what the ledger says of it: an idle one is warm while its weights are there."""
        self.view = view
        if self.state is State.WARM and self._has_yielded:
            self.go(State.YIELDED, "others needed the memory of its weights")
        elif self.state is State.YIELDED and not self._has_yielded:
            self.go(State.WARM, "its weights are back")

    def record(self) -> EngineRecord | None:
        """Return what a later gateway needs to adopt its engine, if it has one."""
        if self.engine is None or (record := self.engine.record()) is None:
            return None
        return replace(record, start_seconds=self.start_seconds, num_starts=self.num_starts)

    def go(self, state: State, reason: str) -> None:
        """Make a transition and tell of it; for its own task."""
        before, self.state = self.state, state
        self.since, self.reason = self._clock(), reason
        for tell in self.on_change:
            tell(self, before, state, reason)

    def has(self, engine: RunningEngine, seconds: float | None) -> None:
        """Have an engine that answered, after a start that took some seconds; for its own task."""
        self.engine = engine
        self.token, self.failure, self.is_out_of_memory = engine.token, "", False
        self.up_at = self.last_used = self._clock()
        self.last_start_seconds = seconds
        if seconds is not None:
            self.starts.measured(seconds)
        self._adapters = Adapters(engine, engine.max_adapters, self.leases.num_of, self._tell_lease)
        self.go(State.WARM, "its engine answered a known prompt")

    def lost(self) -> None:
        """Have no engine any more; leases on it are nobody's. For its own task."""
        self.engine = self.view = None
        if self._doubt is not None:
            self._doubt.cancel()
            self._doubt = None
        if self._adapters is not None:
            self._adapters.close()
            self._adapters = None
        self.leases.revoke()

    @property
    def waits_for_memory(self) -> bool:
        """Whether its engine waits for memory that others have."""
        return self.view is not None and (self.view.waiting_bytes > 0 or self.view.is_waking)

    @property
    def _has_yielded(self) -> bool:
        view = self.view
        return view is not None and view.weights_bytes < view.weights_needed_bytes

    async def _await_well(self, engine: RunningEngine) -> None:
        """Wait until an engine that broke a connection is well; a dead one is seen to be soon."""
        try:
            await well_again(engine, self._patience)
        finally:
            if self._doubt is asyncio.current_task():
                self._doubt = None
        self._tell_lease()

    def _on_lease(self, _lease: ModelLease, ending: Ending | None) -> None:
        if ending is not None:
            self.last_used = self._clock()
            if ending is Ending.DIED_BEFORE and self.engine is not None and self._doubt is None:
                # A process that dies closes its connections before its end can be seen.
                self._doubt = self._loop.create_task(self._await_well(self.engine))
            if ending is Ending.DONE:
                self._life.has_served()
            if self.state is State.BUSY and not self.num_leases:
                self.go(State.YIELDED if self._has_yielded else State.WARM, "its requests are done")
        self._tell_lease()

    def _tell_lease(self) -> None:
        for tell in self.on_lease:
            tell(self)
