"""Observe, decide, act: who starts where, who is stopped for it, who moves, who wakes ahead.

It is the only caller of the policy. Whatever is decided is a message to a model, whose own task
carries it out, so nothing here waits for an engine.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from kvcached_core.errors import KVCachedError
from kvcached_gateway.control.decisions import Decisions
from kvcached_gateway.control.demands import Demands
from kvcached_gateway.control.holds import Holds
from kvcached_gateway.control.machine import MachineView
from kvcached_gateway.control.moves import Moves, Scene
from kvcached_gateway.control.prewarming import Prewarming
from kvcached_gateway.control.relief import Relief
from kvcached_gateway.control.sizes import Sizes
from kvcached_gateway.control.starts import Starts
from kvcached_gateway.control.stops import Stops
from kvcached_gateway.control.turns import Turns
from kvcached_gateway.control.wants import Cause, Want
from kvcached_gateway.line.line import Line
from kvcached_gateway.models.fleet import Fleet
from kvcached_gateway.models.model import Model
from kvcached_gateway.state import PASSING, UP, State

__all__ = ["Controller"]

TICK_SECONDS = 0.5
COUNTERS_SECONDS = 5.0

_log = logging.getLogger(__name__)


class Controller:
    """What decides; everything but `look` runs on the loop's thread.

    Args:
        fleet: The models.
        directory: The folder of the ledgers.
        look: Looks at the machine, beside the loop.
        sizes: What models take.

    Attributes:
        decisions: The last ones.
        machine: What was seen the last time, or None.
        blindness: Why nothing can be seen now, as a sentence; nothing where it can.
        demands: What is asked of each model.
    """

    def __init__(
        self,
        fleet: Fleet,
        directory: Path,
        look: Callable[[], Awaitable[MachineView]],
        sizes: Sizes,
    ) -> None:
        self._fleet = fleet
        self._look = look
        self._sizes = sizes
        self._clock = asyncio.get_running_loop().time
        self._pinned: dict[str, bool] = {}
        self._news = asyncio.Event()
        self._decided = asyncio.Condition()
        self.decisions = Decisions(time.time)
        self.machine: MachineView | None = None
        self.blindness = ""
        self._noted: tuple[str, ...] = ("",)
        self.demands = Demands(fleet.models)
        self._holds = holds = Holds()
        self._stops = stops = Stops(
            fleet, sizes, self.demands, self.decisions, self.is_pinned, holds
        )
        self._starts = Starts(fleet, sizes, self.demands, self.decisions, stops, holds)
        self._relief = Relief(fleet, self._starts, stops, self.decisions)
        self._turns = Turns(
            fleet, self._starts, stops, self.demands, self.decisions, self.is_pinned, holds
        )
        self._moves = Moves(fleet, sizes, self.demands, self.decisions, self._starts, stops)
        self._prewarming = Prewarming(fleet.models, directory, sizes, self.demands, self.decisions)

    @property
    def pressures(self) -> Mapping[str, float]:
        """The KV pressure ratio of each device."""
        return self._moves.pressures

    def scene(self, *, is_whole: bool = True) -> Scene:
        """Return what placement sees of this machine; nothing before the first look.

        Args:
            is_whole: Whether models without a place are in it.
        """
        if self.machine is None:
            return Scene((), (), frozenset())
        return self._moves.scene(self.machine, is_whole=is_whole)

    def weighted_rate(self, model: Model) -> float | None:
        """Return how hard a model presses on its devices; None where that is not known yet."""
        return self.demands.weighted_rate(model, self._sizes, self._fleet.settings.classes)

    def follow(self, line: Line) -> None:
        """Learn from a line what is asked of each model, and tell it; before the first request."""
        self.demands.of, self.demands.waiting = line.demand, line.waiting
        self.demands.oldest_wait_seconds = line.oldest_wait_seconds
        self._turns.on_end = line.changed

    def wanted(self, model_id: str) -> None:
        """Have a model started, because a request waits for it; for the line.

        Of a model whose requests are refused while it loads nobody waits, and it starts all the
        same.
        """
        is_refused = self._fleet.models[model_id].settings.loading == "refuse"
        if is_refused:
            self._want(model_id, Cause.ORDER, "a request came for it")
        else:
            # After a start that came to nothing it is as old as the request that still waits.
            since = self._clock() - self.demands.oldest_wait_seconds(model_id, self._clock())
            self._want(model_id, Cause.REQUEST, "a request waits for it", since)

    def warm(self, model_id: str) -> None:
        """Have a model started or woken, because somebody said so.

        Raises:
            KeyError: If there is no such model.
        """
        model = self._fleet.models[model_id]
        if model.state in UP:
            self.decisions.add(model_id, "wake", "somebody said so")
            self._prewarming.wake(model)
        else:
            self._want(model_id, Cause.ORDER, "somebody said so")

    def stop(self, model_id: str) -> None:
        """End a model's engine, because somebody said so; who ordered its start does no more."""
        self._starts.take_back(model_id)
        self._fleet.models[model_id].stop("somebody said so")

    def pin(self, model_id: str, *, is_pinned: bool) -> None:
        """Never stop a model for another one, or do, whatever the file says."""
        self._pinned[model_id] = is_pinned

    def is_pinned(self, model: Model) -> bool:
        """Return whether a model is never stopped for another."""
        return self._pinned.get(model.id, model.settings.pin)

    def hindrance(self, model_id: str) -> str:
        """Return what a model that does not start waits for; for the line."""
        return self.blindness or self.decisions.hindrance(model_id)

    def held(self, model_id: str) -> str:
        """Return why a model that is up takes no new requests now; for the line."""
        return self._holds.held(model_id)

    def changed(self, model: Model, before: State, after: State, reason: str) -> None:
        """Take notice of a model's transition."""
        del reason
        self._stops.givers.changed(model, before, after, self._clock())
        self._moves.changed(model, after)
        self._prewarming.changed(model, before, after)
        # Each request begins and ends with one of these; where nobody waits for a start they are
        # nothing to decide at once, unless somebody holds back.
        is_answer = {before, after} == {State.WARM, State.BUSY}
        if not is_answer or self._starts.wants or self._turns.concern(model.id):
            self._news.set()

    async def run(self) -> None:
        """Decide until cancelled: at once when something is wanted, else twice a second."""
        counters = asyncio.ensure_future(self._count())
        try:
            while True:
                self._news.clear()
                try:
                    seen_at = self._clock()
                    machine = replace(await self._look(), seen_at=seen_at)
                    self._note("", *machine.problems)
                    self.tick(machine, self._clock())
                except (KVCachedError, OSError) as error:
                    # Without the ledgers nothing can be decided; who is up goes on serving.
                    self._note(f"the machine cannot be looked at, so nothing starts: {error}")
                    self._turns.end()
                except Exception:  # noqa: BLE001  it has to go on: who waits would wait for ever
                    _log.exception("nothing could be decided")
                    self._turns.end()
                async with self._decided:
                    self._decided.notify_all()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._news.wait(), TICK_SECONDS)
        finally:
            counters.cancel()

    def _note(self, blindness: str, *problems: str) -> None:
        """Keep why nothing, or not everything, can be seen; say it once."""
        self.blindness = blindness
        before, self._noted = self._noted, (blindness, *problems)
        for text in filter(None, self._noted):
            if text not in before:
                _log.warning("%s", text)

    def tick(self, machine: MachineView, now: float) -> None:
        """Decide once, by what there is and the loop's seconds."""
        self.machine = machine
        self._sizes.learn_others(machine)
        self.demands.look(now)
        self._observe(machine)
        for model in self._fleet.models.values():
            self._end_idle(model, now)
        for want in self._prewarming.wants(machine, now):
            self._starts.want(want)
        self._turns.look(machine, now)
        self._starts.decide(machine, now, self._moves.place)
        self._relief.decide(machine, now)
        self._turns.decide(machine, now)
        self._moves.decide(machine, now)
        # Behind the starts: one that is only told to end is not down yet.
        for name in self._fleet.end_stale():
            self._want(name, Cause.AHEAD, "the file says something else of it now")

    def _want(self, model_id: str, cause: Cause, reason: str, since: float | None = None) -> None:
        self._starts.want(Want(model_id, cause, reason, self._clock() if since is None else since))
        self._news.set()

    def _observe(self, machine: MachineView) -> None:
        """Tell each model what the ledger says of it, and learn what those that are up take."""
        num_engines = Counter(model.id for model in self._fleet.all if model.engine is not None)
        for model in self._fleet.models.values():
            views = machine.views(model.settings.instance_name, model.devices)
            model.observed(min(views, key=lambda view: view.weights_bytes, default=None))
        self._sizes.learn(
            [
                (model.settings, model.devices)
                for model in self._fleet.models.values()
                if model.state in UP and num_engines[model.id] == 1
            ],
            machine,
            {name for each in self._fleet.all if each.state in PASSING for name in each.devices},
        )

    def _end_idle(self, model: Model, now: float) -> None:
        limit = model.settings.idle_limit_seconds
        is_idle = model.state in {State.WARM, State.YIELDED} and not self.demands.waiting(model.id)
        if limit is None or not is_idle or self.is_pinned(model) or now - model.last_used < limit:
            return
        reason = f"it had no request for {now - model.last_used:.0f} s; its idle_limit is {limit:g}"
        self.decisions.add(model.id, "stop", reason)
        model.stop(reason)

    async def settled(self, model_id: str) -> None:
        """Wait until a model neither waits for a start, nor starts, nor ends.

        Raises:
            KeyError: If there is no such model.
        """
        async with self._decided:
            await self._decided.wait_for(lambda: model_id not in self._starts.wants)
        await self._fleet.models[model_id].settled()

    async def _count(self) -> None:
        """Read the engines' counters, again and again."""
        while True:
            await self.demands.read()
            await asyncio.sleep(COUNTERS_SECONDS)

    def explain(self, model_id: str) -> str:
        """Say why a model is where it is, and who would go next.

        Raises:
            KeyError: If there is no such model.
        """
        model = self._fleet.models[model_id]
        now = self._clock()
        lines = [f"{model.id} is {model.state} for {now - model.since:.0f} s: {model.reason}"]
        if model.devices:
            lines.append(f"on {', '.join(model.devices)}")
        if hindrance := self.decisions.hindrance(model_id):
            lines.append(f"it waits: {hindrance}")
        if held := self.held(model_id):
            lines.append(f"it holds back: {held}")
        if self.blindness:
            lines.append(self.blindness)
        if model.state in UP:
            going = self._stops.next_to_go(now)
            first = next(iter(going.victims), "nobody")
            first = "it" if first == model_id else first
            why = f"; it {going.stays[model_id]}" if model_id in going.stays else ""
            lines.append(f"who would be stopped first for another model: {first}{why}")
        lines += [
            f"{time.strftime('%H:%M:%S', time.localtime(one.at))} {one.verb}: {one.reason}"
            for one in self.decisions.of(model_id)
        ]
        return "\n".join(lines)
