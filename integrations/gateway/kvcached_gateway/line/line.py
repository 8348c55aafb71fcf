"""The line: requests wait here for their engines, first come, first served for each model.

All of it runs on the loop's thread. A request that its engine takes at once never waits: its lease
comes without a switch to another task. One that waits is a ticket in its model's queue, and leaves
it in one of four ways: a lease, a refusal, the end of its time, or its client.

Where a request has a class with a goal, all that wait for its devices go in the order of
`precedence` from then on; elsewhere nothing of that runs.
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from functools import partial

from kvcached_gateway.errors import RefusedError, draining, model_not_found, past_deadline
from kvcached_gateway.lease import Ask, Lease
from kvcached_gateway.line import refusals
from kvcached_gateway.line.going_past import serve_in_order
from kvcached_gateway.line.grantor import Grantor, Readiness
from kvcached_gateway.line.precedence import Devices, Precedence, devices_of, goal_of
from kvcached_gateway.line.tickets import Queue, QueueView, Ticket
from kvcached_gateway.policy.demand import Demand
from kvcached_gateway.settings.config import ModelSettings, ServiceClass, Settings

__all__ = ["Line"]


class Line:
    """Every request that has no lease yet, as `lease.Leases` to whoever serves HTTP.

    Args:
        models: Every model that may give leases, by its name in the file. Read at each call.
        settings: What the file says now.
        clock: Monotonic seconds: the loop's own.
        wanted: Called with a model that stays cold unless somebody starts it, once for any number
            of requests, and again if its start came to nothing. Where it cannot start yet, whoever
            starts it looks at `waiting`.
        hindrance: Says, as a sentence, what a model that does not start waits for.
        held: Says likewise why one that is up takes no new request now; nothing where it does.

    Attributes:
        on_late: Called with its model when a request goes behind those that make their goals.
    """

    def __init__(
        self,
        models: Mapping[str, Grantor],
        settings: Callable[[], Settings],
        clock: Callable[[], float],
        wanted: Callable[[str], None],
        hindrance: Callable[[str], str] = lambda _model_id: "",
        held: Callable[[str], str] = lambda _model_id: "",
    ) -> None:
        self._models = models
        self._settings = settings
        self._clock = clock
        self._wanted = wanted
        self._hindrance = hindrance
        self._held = held
        self.on_late: list[Callable[[str], None]] = []
        self._queues: dict[str, Queue] = {}
        self._demands: dict[str, Demand] = {}
        self._precedence: dict[Devices, Precedence] = {}
        self._due: set[Devices] = set()

    async def take(self, ask: Ask) -> Lease:
        """Wait for a lease; a cancelled call leaves no trace.

        Raises:
            RefusedError: 404 no such model; 429 a full line; 503 a model that failed or does not
                come up in time, or a goal that cannot be made; 504 the client's own deadline.
        """
        found = self._settings().resolve(ask.model)
        model = self._models.get(found.adapter_of or found.id) if found else None
        if found is None or model is None:
            raise model_not_found(ask.model)
        if refusal := model.refusal():
            raise refusal
        queue = self._queues.setdefault(model.id, Queue(model.id))
        goal = goal_of(ask, found, self._settings())
        queue.has_goals = queue.has_goals or goal is not None
        if not ask.is_again:
            self.demand(model.id).arrived(self._clock())
        if not self._has_line(queue, model) and (lease := self._granted(queue, model, ask, 0.0)):
            return lease
        self._check(queue, ask, found, model)
        return await self._wait(queue, ask, found, goal)

    def changed(self, model_id: str) -> None:
        """Give leases to whoever can have one now: a model's state, or a lease of it, changed."""
        queue = self._queues.get(model_id)
        if queue is None:
            return
        if queue:
            self._dispatch(queue)
        elif model := self._models.get(model_id):
            self._look_at(queue, model)
        if not queue and model_id not in self._models:
            del self._queues[model_id]
            self._demands.pop(model_id, None)

    def close(self) -> None:
        """Refuse whoever waits: the gateway ends."""
        for queue in self._queues.values():
            while ticket := queue.first():
                queue.remove(ticket)
                ticket.refuse(draining())

    def waiting(self, model_id: str) -> int:
        """Return how many requests wait for a model."""
        return len(self._queues.get(model_id, ()))

    def oldest_wait_seconds(self, model_id: str, now: float) -> float:
        """Return how long the one has waited that waits longest, 0 where none does."""
        queue = self._queues.get(model_id)
        return queue.oldest_wait_seconds(now) if queue else 0.0

    def views(self) -> Iterator[QueueView]:
        """Say what waits for each model for which something does."""
        now = self._clock()
        for name, queue in self._queues.items():
            if queue:
                yield QueueView(name, len(queue), queue.oldest_wait_seconds(now))

    def demand(self, model_id: str) -> Demand:
        """Return what is known of a model's requests; whoever reads its counters tells it."""
        return self._demands.setdefault(model_id, Demand())

    def _precedence_on(self, queue: Queue, model: Grantor) -> Precedence | None:
        """Return who goes first on a model's devices, if a request with a goal ever came there."""
        if not self._settings().classes:
            self._precedence.clear()
            return None
        devices = devices_of(model)
        if queue.has_goals and devices not in self._precedence:
            self._precedence[devices] = Precedence(
                self._clock, self.demand, lambda: self._soon(devices), self._tell_late
            )
        return self._precedence.get(devices)

    def _tell_late(self, model_id: str) -> None:
        for tell in self.on_late:
            tell(model_id)

    def _has_line(self, queue: Queue, model: Grantor) -> bool:
        """Whether a new request has to wait for others, or its engine has enough to read."""
        precedence = self._precedence_on(queue, model)
        if precedence is None:
            return bool(queue)
        return bool(self._queues_on(devices_of(model))) or not precedence.has_room(model.id)

    def _queues_on(self, devices: Devices) -> list[Queue]:
        """Return the queues of a set of devices in which somebody waits."""
        return [
            queue
            for name, queue in self._queues.items()
            if queue and name in self._models and devices_of(self._models[name]) == devices
        ]

    def _check(self, queue: Queue, ask: Ask, found: ModelSettings, model: Grantor) -> None:
        """Refuse who may not wait. One whose engine died had its place before."""
        if ask.is_again:
            return
        if len(queue) >= found.max_queue:
            waited = queue.oldest_wait_seconds(self._clock())
            raise refusals.queue_full(found.id, len(queue), found.max_queue, waited)
        if found.loading == "refuse" and model.readiness is not Readiness.UP:
            self._want(queue, model)
            raise self._not_up(found.id, model, "its file says: loading: refuse")

    async def _wait(
        self, queue: Queue, ask: Ask, found: ModelSettings, goal: ServiceClass | None
    ) -> Lease:
        """Wait in a queue, at most as long as the model and the client allow."""
        ticket = Ticket.of(ask, found, goal, self._clock())
        queue.add(ticket)
        try:
            self._dispatch(queue)
            if not ticket.answer.done():
                ticket.timer = self._timer(queue, ticket)
            return await ticket.answer
        except asyncio.CancelledError:
            ticket.give_back()
            self._leave(queue, ticket)
            raise
        finally:
            queue.remove(ticket)
            if ticket.timer:
                ticket.timer.cancel()

    def _timer(self, queue: Queue, ticket: Ticket) -> asyncio.TimerHandle:
        """End a ticket's wait when the first of its two limits is reached."""
        seconds, is_own = ticket.ask.patience(ticket.max_wait_seconds)

        def end() -> None:
            too_late = past_deadline(ticket.model_id) if is_own else self._too_long(ticket, queue)
            ticket.refuse(too_late)
            self._leave(queue, ticket)

        return asyncio.get_running_loop().call_at(ticket.arrival + seconds, end)

    def _leave(self, queue: Queue, ticket: Ticket) -> None:
        """Take out one that waits no more; it may have been all that held up those behind it."""
        queue.remove(ticket)
        if queue:
            self._dispatch(queue)

    def _dispatch(self, queue: Queue) -> None:
        """Give leases and refusals in order; have the model started if it is cold."""
        if queue.is_busy:
            return  # a grant changed the model, which says so: the loop below goes on by itself
        model = self._models.get(queue.model_id)
        queue.is_busy = True
        try:
            self._refuse_all(queue, model)
            if model and self._precedence_on(queue, model):
                self._soon(devices_of(model))
            elif model:
                serve_in_order(queue, model, partial(self._serve, queue, model))
        finally:
            queue.is_busy = False
        if model:
            self._look_at(queue, model)

    def _refuse_all(self, queue: Queue, model: Grantor | None) -> None:
        """Refuse who waits for a model that failed or is gone."""
        while ticket := queue.first():
            refusal = model.refusal() if model else model_not_found(ticket.ask.model)
            if refusal is None:
                return
            queue.remove(ticket)
            ticket.refuse(refusal)

    def _look_at(self, queue: Queue, model: Grantor) -> None:
        """Notice how far a model is, and have it started for those who wait."""
        if model.readiness is Readiness.COLD:
            queue.coming_at = None
            queue.is_wanted = queue.is_wanted and bool(queue)  # whoever comes next says it anew
            if queue:
                self._want(queue, model)
            return
        queue.is_wanted = False
        if model.readiness is Readiness.UP:
            queue.coming_at = None
        elif queue.coming_at is None:
            queue.coming_at = self._clock()

    def _serve(self, queue: Queue, model: Grantor, ticket: Ticket) -> bool:
        """Give one ticket its lease; say whether there was one."""
        lease = self._granted(queue, model, ticket.ask, self._clock() - ticket.arrival)
        if lease is None:
            return False
        queue.remove(ticket)
        ticket.grant(lease)
        return True

    def _granted(
        self, queue: Queue, model: Grantor, ask: Ask, waited_seconds: float
    ) -> Lease | None:
        """Return a lease if the model gives one, counted."""
        lease = None if self._held(model.id) else model.grant(ask, waited_seconds)
        if lease is None:
            return None
        self.demand(model.id).sent(ask.body_bytes)
        precedence = self._precedence_on(queue, model)
        return precedence.watched(lease, model.id, ask.body_bytes) if precedence else lease

    def _soon(self, devices: Devices) -> None:
        """Serve in turn once all that happens now has happened: one order for all of it."""
        if devices not in self._due:
            self._due.add(devices)
            asyncio.get_running_loop().call_soon(self._serve_in_turn, devices)

    def _serve_in_turn(self, devices: Devices) -> None:
        """Give leases in the order of goals."""
        self._due.discard(devices)
        queues = self._queues_on(devices)
        if precedence := self._precedence.get(devices):
            precedence.take(queues, self._models, self._serve)
        else:  # the classes are gone from the file
            for queue in queues:
                self._dispatch(queue)

    def _want(self, queue: Queue, model: Grantor) -> None:
        """Have a cold model started, once."""
        if model.readiness is Readiness.COLD and not queue.is_wanted:
            queue.is_wanted = True
            self._wanted(queue.model_id)

    def _too_long(self, ticket: Ticket, queue: Queue) -> RefusedError:
        """Say that a request waited as long as its model allows, and what for."""
        seconds = ticket.max_wait_seconds
        model = self._models.get(queue.model_id)
        if model and model.readiness is not Readiness.UP:
            return self._not_up(ticket.model_id, model, f"the request waited {seconds:g} s for it")
        return refusals.busy(ticket.model_id, seconds, self._held(queue.model_id))

    def _not_up(self, name: str, model: Grantor, why: str) -> RefusedError:
        """Say that a model is not up yet."""
        return refusals.not_up(name, why, self._hindrance(model.id), model.start_seconds)
