"""Who goes first on devices whose requests have goals.

It holds what engines read there, and asks `policy.admission` for the order of all that wait.
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain

from kvcached_gateway.lease import Ask, Lease, Woken
from kvcached_gateway.line import refusals
from kvcached_gateway.line.grantor import Grantor, Readiness
from kvcached_gateway.line.reading import ReadingLease, Readings
from kvcached_gateway.line.tickets import Queue, Ticket
from kvcached_gateway.policy import admission
from kvcached_gateway.policy.admission import Order, Pace, Prompt
from kvcached_gateway.policy.demand import Demand
from kvcached_gateway.settings.config import ModelSettings, ServiceClass, Settings

Devices = tuple[str, ...]
Serve = Callable[[Queue, Grantor, Ticket], bool]


class Precedence:
    """Who goes first on one set of devices, from the first request with a goal there.

    Args:
        clock: The loop's seconds.
        demand: What is known of a model's requests.
        look: Called when somebody's turn may have come.
        on_late: Called with its model when a request is late, once for each.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        demand: Callable[[str], Demand],
        look: Callable[[], None],
        on_late: Callable[[str], None],
    ) -> None:
        self._clock = clock
        self._demand = demand
        self._look = look
        self._on_late = on_late
        self._readings = Readings()
        self._timer: asyncio.TimerHandle | None = None

    def has_room(self, model_id: str) -> bool:
        """Whether a model's engine should get one more prompt now."""
        return self._readings.has_room(model_id, self._clock())

    def watched(self, lease: Lease, model_id: str, body_bytes: int) -> Lease:
        """Return a lease that counts until its prompt is read."""
        now, demand = self._clock(), self._demand(model_id)
        stalls_at = admission.stalls_at(now, demand.reading_seconds(body_bytes))
        prompt = Prompt(model_id, demand.prompt_tokens(body_bytes), stalls_at)
        reading = self._readings.begin(prompt)

        def on_read(is_first_byte: bool) -> None:  # noqa: FBT001  the one thing that it hears
            if not self._readings.end(reading):
                return
            if is_first_byte and reading.is_alone and lease.woken is Woken.NONE:
                demand.read(body_bytes, self._clock() - now)
            self._look()

        return ReadingLease(lease, on_read)

    def take(self, queues: Sequence[Queue], models: Mapping[str, Grantor], serve: Serve) -> None:
        """Give leases in order while engines want prompts; refuse the late whose class says so.

        Args:
            queues: All on these devices in which somebody waits.
            models: Their models.
            serve: Gives one its lease, and says whether there was one.
        """
        by_id = {queue.model_id: queue for queue in queues}
        open_ids = {name for name in by_id if self.has_room(name)}
        if not open_ids and not any(one.is_refused_late for queue in queues for one in queue):
            self._look_again()
            return
        order = self._order(queues, models)
        self._note_late(order)
        refuse_late(queues, order)
        passing: dict[str, frozenset[str]] = {}  # where one waits for its adapter: who goes past
        for ticket in in_turn(queues, order):
            name = ticket.model
            if not open_ids:
                break
            if name not in open_ids or ticket.answer.done():
                continue
            if ticket.ask.model not in passing.get(name, (ticket.ask.model,)):
                continue
            if not self.has_room(name):
                open_ids.discard(name)
            elif not serve(by_id[name], models[name], ticket):
                names = models[name].may_go_past(ticket.ask)
                passing[name] = names & passing.get(name, names)
                if not passing[name]:
                    open_ids.discard(name)
        if any(queues):
            self._look_again()

    def _note_late(self, order: Order[Ticket]) -> None:
        """Tell of each request that is late, once."""
        for ticket in order.late:
            if not ticket.is_late:
                ticket.is_late = True
                self._on_late(ticket.model)

    def _look_again(self) -> None:
        """Look again when a prompt stalls, and may no longer hold up other models."""
        if self._timer:
            self._timer.cancel()
        at = self._readings.next_stall_at(self._clock())
        loop = asyncio.get_running_loop()
        self._timer = None if at is None else loop.call_at(at, self._look)

    def _order(self, queues: Sequence[Queue], models: Mapping[str, Grantor]) -> Order[Ticket]:
        """Return the order of all that wait, but for those whose engine died: they go first."""
        now = self._clock()
        waiting = chain.from_iterable(queue.waiting() for queue in queues)
        paces = {queue.model_id: self._pace(queue, models[queue.model_id], now) for queue in queues}
        return admission.order(waiting, now, paces)

    def _pace(self, queue: Queue, model: Grantor, now: float) -> Pace:
        """Return how soon a model's requests are answered."""
        speed = self._demand(queue.model_id).reading_speed
        if model.readiness is Readiness.UP:
            return Pace(speed)
        return Pace(speed, start_seconds_left(queue, model, now), queue.first())


def in_turn(queues: Sequence[Queue], order: Order[Ticket]) -> Iterator[Ticket]:
    """Return all that wait, in turn: whose engine died, who makes its goal, who is late."""
    returned = chain.from_iterable(queue.returned() for queue in queues)
    return chain(returned, order.kept, order.late)


def refuse_late(queues: Sequence[Queue], order: Order[Ticket]) -> None:
    """Refuse those who miss their goal and whose class does not wait then."""
    by_id = {queue.model_id: queue for queue in queues}
    for ticket in order.late:
        if ticket.is_refused_late:
            by_id[ticket.model].remove(ticket)
            ticket.refuse(refusals.late(ticket.model_id, order.reason(ticket)))


def start_seconds_left(queue: Queue, model: Grantor, now: float) -> float:
    """Return what is left of a model's start."""
    if model.readiness is Readiness.UP:
        return 0.0
    begun = 0.0 if queue.coming_at is None else now - queue.coming_at
    return max(model.start_seconds - begun, 0.0)


def goal_of(ask: Ask, model: ModelSettings, settings: Settings) -> ServiceClass | None:
    """Return the class of a request if it has a goal: its key's, or else its model's."""
    found = settings.classes.get(ask.class_name or model.class_name or "")
    return found if found and found.ttft_seconds is not None else None


def devices_of(model: Grantor) -> Devices:
    """Return whom a model shares an order with: its devices, or itself where it has none."""
    return tuple(sorted(model.devices)) or (f"no device of {model.id}",)
