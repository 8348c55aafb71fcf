"""Requests that wait for one model, in the order in which they came."""

import asyncio
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

from kvcached_gateway.errors import RefusedError
from kvcached_gateway.lease import Ask, Ending, Lease
from kvcached_gateway.policy.admission import Waiting
from kvcached_gateway.settings.config import ModelSettings, ServiceClass


@dataclass(eq=False, slots=True, kw_only=True)
class Ticket(Waiting):
    """One request that waits; its work is its body's bytes, and it is overdue after half its wait.

    Attributes:
        ask: What it says of itself.
        model_id: What it asks for, as in the file; an adapter waits with its base, `model`.
        max_wait_seconds: What it waits at most.
        is_refused_late: Whether it is refused once it cannot make that goal.
        is_late: Whether it ever was put behind those that make their goals.
        answer: Its lease, or why there is none.
        timer: What ends its wait.
    """

    ask: Ask
    model_id: str
    max_wait_seconds: float
    is_refused_late: bool = False
    is_late: bool = False
    answer: asyncio.Future[Lease] = field(default_factory=asyncio.Future)
    timer: asyncio.TimerHandle | None = None

    @classmethod
    def of(cls, ask: Ask, model: ModelSettings, goal: ServiceClass | None, now: float) -> "Ticket":
        """Return one that comes now, for a request with a class that has a goal, or without."""
        ttft_seconds = goal.ttft_seconds if goal else None
        return cls(
            model=model.adapter_of or model.id,
            arrival=now,
            deadline=None if ttft_seconds is None else now + ttft_seconds,
            work=ask.body_bytes,
            overdue_at=now + model.max_wait_seconds / 2,
            ask=ask,
            model_id=model.id,
            max_wait_seconds=model.max_wait_seconds,
            is_refused_late=goal is not None and ttft_seconds is not None and goal.late == "refuse",
        )

    def grant(self, lease: Lease) -> None:
        """Hand over its lease; where its client just left, the lease goes back."""
        if self.answer.done():
            lease.end(Ending.CANCELLED)
        else:
            self.answer.set_result(lease)

    def refuse(self, refusal: RefusedError) -> None:
        """Say that there will be no lease."""
        if not self.answer.done():
            self.answer.set_exception(refusal)

    def give_back(self) -> None:
        """End the lease that came while its client left."""
        answer = self.answer
        if answer.done() and not answer.cancelled() and not answer.exception():
            answer.result().end(Ending.CANCELLED)


class Queue:
    """The tickets of one model: those whose engine died first, then the others as they came.

    Attributes:
        model_id: The model.
        is_wanted: Whether somebody was told to start it, and has not begun.
        is_busy: Whether its tickets are being given leases right now.
        has_goals: Whether a request with a goal ever came.
        coming_at: Since when it is seen to come up, or None.
    """

    def __init__(self, model_id: str) -> None:
        self.model_id = model_id
        self.is_wanted = False
        self.is_busy = False
        self.has_goals = False
        self.coming_at: float | None = None
        self._returned: OrderedDict[Ticket, None] = OrderedDict()
        self._tickets: OrderedDict[Ticket, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._returned) + len(self._tickets)

    def __iter__(self) -> Iterator[Ticket]:
        return chain(self._returned, self._tickets)

    def add(self, ticket: Ticket) -> None:
        """Put a ticket at the end, or behind the other returned ones if its engine died."""
        (self._returned if ticket.ask.is_again else self._tickets)[ticket] = None

    def remove(self, ticket: Ticket) -> None:
        """Take a ticket out, wherever it is; one that is not there stays so."""
        self._returned.pop(ticket, None)
        self._tickets.pop(ticket, None)

    def returned(self) -> Iterator[Ticket]:
        """Return those whose engine died, in order."""
        return iter(self._returned)

    def waiting(self) -> Iterator[Ticket]:
        """Return the others, as they came."""
        return iter(self._tickets)

    def first(self) -> Ticket | None:
        """Return the one whose turn it is, or None."""
        return next(iter(self), None)

    def oldest_wait_seconds(self, now: float) -> float:
        """Return how long the one has waited that waits longest, 0 where none does."""
        firsts = (next(iter(part), None) for part in (self._returned, self._tickets))
        return max((now - ticket.arrival for ticket in firsts if ticket), default=0.0)


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
