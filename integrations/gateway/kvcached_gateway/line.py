"""The line: requests wait here for their engines, first come, first served for each model.

All of it runs on the loop's thread. A request that its engine takes at once never waits: its lease
comes without a switch to another task. One that waits is a ticket in its model's queue, and leaves
it in one of four ways: a lease, a refusal, the end of its time, or its client.
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from kvcached_gateway.errors import RefusedError
from kvcached_gateway.lease import Ask, Lease
from kvcached_gateway.tickets import Queue, Ticket

LEAST_RETRY_SECONDS = 1.0


class Readiness(StrEnum):
    """What a request may expect of a model."""

    COLD = "cold"  # it stays down until somebody starts it
    COMING = "coming"  # it starts, or goes down and will be cold
    UP = "up"  # it serves, or wakes by itself when it is asked


class Grantor(Protocol):
    """What the line sees of a model."""

    @property
    def id(self) -> str:
        """Its name in the file."""

    @property
    def readiness(self) -> Readiness:
        """Whether it serves."""

    @property
    def start_seconds(self) -> float:
        """What its start takes, measured; 0 before the first."""

    @property
    def devices(self) -> tuple[str, ...]:
        """Where it runs or is about to; nothing where it has no place."""

    def grant(self, ask: Ask, waited_seconds: float) -> Lease | None:
        """Return a lease, or None: not now."""

    def refusal(self) -> RefusedError | None:
        """Return, in a new error each time, why nothing will come of it; None where it may."""


class LineModel(Protocol):
    """What the line reads of a model's part of the file."""

    @property
    def id(self) -> str:
        """Its name."""

    @property
    def adapter_of(self) -> str | None:
        """Whose adapter it is; it waits in that one's queue."""

    @property
    def class_name(self) -> str | None:
        """Its class."""

    @property
    def max_wait_seconds(self) -> float:
        """What a request waits at most."""

    @property
    def max_queue(self) -> int:
        """How many wait at most."""

    @property
    def loading(self) -> str:
        """`refuse`: a request does not wait for a start."""


class LineSettings(Protocol):
    """What the line reads of the file."""

    def resolve(self, name: str) -> LineModel | None:
        """Return the model of a name, an alias or an adapter."""


@dataclass(frozen=True)
class QueueView:
    """What waits for one model.

    Attributes:
        model_id: The model.
        num_waiting: How many requests.
        oldest_wait_seconds: How long the first of them has waited.
    """

    model_id: str
    num_waiting: int
    oldest_wait_seconds: float


def nothing_known(_model_id: str) -> str:
    """Know nothing of what a model waits for."""
    return ""


class Line:
    """Every request that has no lease yet, as `lease.Leases` to whoever serves HTTP.

    Args:
        models: Every model that may give leases, by its name in the file. Read at each call.
        settings: What the file says now.
        clock: Monotonic seconds: the loop's own.
        wanted: Called with a model that stays cold unless somebody starts it, once for any number
            of requests, and again if its start came to nothing.
        hindrance: Says, as a sentence, what a model that does not start waits for.
    """

    def __init__(
        self,
        models: Mapping[str, Grantor],
        settings: Callable[[], LineSettings],
        clock: Callable[[], float],
        wanted: Callable[[str], None],
        hindrance: Callable[[str], str] = nothing_known,
    ) -> None:
        self._models = models
        self._settings = settings
        self._clock = clock
        self._wanted = wanted
        self._hindrance = hindrance
        self._queues: dict[str, Queue] = {}

    async def take(self, ask: Ask) -> Lease:
        """Wait for a lease; a cancelled call leaves no trace.

        Raises:
            RefusedError: 404 no such model; 429 a full line; 503 a model that failed or does not
                come up in time; 504 the client's own deadline.
        """
        found = self._settings().resolve(ask.model)
        model = self._models.get(found.adapter_of or found.id) if found else None
        if found is None or model is None:
            raise not_found(ask.model)
        if refusal := model.refusal():
            raise refusal
        queue = self._queues.setdefault(model.id, Queue(model.id))
        if not queue and (lease := model.grant(ask, 0.0)):
            return lease
        self._check(queue, ask, found, model)
        return await self._wait(queue, ask, found)

    def changed(self, model_id: str) -> None:
        """Give leases to whoever can have one now: a model's state, or a lease of it, changed."""
        if queue := self._queues.get(model_id):
            self._dispatch(queue)
            if not queue and model_id not in self._models:
                del self._queues[model_id]

    def waiting(self, model_id: str) -> int:
        """Return how many requests wait for a model."""
        return len(self._queues.get(model_id, ()))

    def oldest_wait_seconds(self, model_id: str, now: float) -> float:
        """Return how long the one has waited that waits longest, 0 where none does."""
        queue = self._queues.get(model_id)
        arrival = queue.oldest_arrival() if queue else None
        return 0.0 if arrival is None else now - arrival

    def views(self) -> Iterator[QueueView]:
        """Say what waits for each model for which something does."""
        now = self._clock()
        for name, queue in self._queues.items():
            if queue:
                yield QueueView(name, len(queue), self.oldest_wait_seconds(name, now))

    def _check(self, queue: Queue, ask: Ask, found: LineModel, model: Grantor) -> None:
        """Refuse who may not wait. One whose engine died had its place before."""
        if ask.is_again:
            return
        if len(queue) >= found.max_queue:
            waited = self.oldest_wait_seconds(model.id, self._clock())
            raise RefusedError(
                429,
                "queue_full",
                f"{len(queue)} requests wait for {found.id!r}; max_queue is {found.max_queue}",
                retry_after_seconds=max(LEAST_RETRY_SECONDS, waited),
            )
        if found.loading == "refuse" and model.readiness is not Readiness.UP:
            self._want(queue, model)
            raise self._not_up(found.id, model, "its file says: loading: refuse")

    async def _wait(self, queue: Queue, ask: Ask, found: LineModel) -> Lease:
        """Wait in a queue, at most as long as the model and the client allow."""
        ticket = Ticket(ask, found.id, self._clock(), found.max_wait_seconds)
        queue.add(ticket)
        try:
            self._dispatch(queue)
            if not ticket.answer.done():
                ticket.timer = self._timer(queue, ticket)
            return await ticket.answer
        except asyncio.CancelledError:
            ticket.give_back()
            raise
        finally:
            queue.remove(ticket)
            if ticket.timer:
                ticket.timer.cancel()

    def _timer(self, queue: Queue, ticket: Ticket) -> asyncio.TimerHandle:
        """End a ticket's wait when the first of its two limits is reached."""
        own = ticket.ask.deadline_seconds
        is_own = own is not None and own <= ticket.max_wait_seconds
        seconds = own if own is not None and is_own else ticket.max_wait_seconds

        def end() -> None:
            queue.remove(ticket)
            ticket.refuse(
                past_deadline(ticket.model_id, seconds) if is_own else self._too_long(ticket, queue)
            )

        return asyncio.get_running_loop().call_at(ticket.arrival + seconds, end)

    def _dispatch(self, queue: Queue) -> None:
        """Give leases in order until the model takes no more; have it started if it is cold."""
        if queue.is_busy:
            return  # a grant changed the model, which says so: the loop below goes on by itself
        model = self._models.get(queue.model_id)
        queue.is_busy = True
        try:
            while (ticket := queue.first()) and self._settle(queue, ticket, model):
                pass
        finally:
            queue.is_busy = False
        if model and model.readiness is not Readiness.COLD:
            queue.is_wanted = False
        elif model and queue:
            self._want(queue, model)

    def _settle(self, queue: Queue, ticket: Ticket, model: Grantor | None) -> bool:
        """Give one ticket its lease or its refusal; say whether there was one."""
        refusal = model.refusal() if model else not_found(ticket.ask.model)
        if refusal:
            ticket.refuse(refusal)
        elif model and (lease := model.grant(ticket.ask, self._clock() - ticket.arrival)):
            ticket.grant(lease)
        else:
            return False
        queue.remove(ticket)
        return True

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
        return RefusedError(
            503,
            "model_busy",
            f"{ticket.model_id!r} is busy; the request waited {seconds:g} s, which is max_wait",
            retry_after_seconds=LEAST_RETRY_SECONDS,
        )

    def _not_up(self, name: str, model: Grantor, why: str) -> RefusedError:
        """Say that a model is not up yet."""
        parts = (f"{name!r} is not up yet", why, self._hindrance(model.id))
        return RefusedError(
            503,
            "model_loading",
            "; ".join(part for part in parts if part),
            retry_after_seconds=max(LEAST_RETRY_SECONDS, model.start_seconds),
        )


def not_found(name: str) -> RefusedError:
    """Say that there is no such model."""
    return RefusedError(404, "model_not_found", f"there is no model {name!r} here")


def past_deadline(model_id: str, seconds: float) -> RefusedError:
    """Say that the client's own deadline came before a lease."""
    return RefusedError(
        504, "deadline", f"{model_id!r} took no request within the {seconds:g} s of its deadline"
    )
