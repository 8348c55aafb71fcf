"""Simulated engines: weights that come and go, prompts that are read one by one, answers."""

from scale.clock import Clock, deciding
from scale.cluster import Device, Model, State
from scale.inputs import Assumptions, Request
from scale.tally import Tally

from kvcached_gateway.policy.admission import Waiting, order

AWAKE, YIELDED, COLD = "awake", "yielded", "cold"


class Serving:
    """What devices do with requests, below the gateway.

    A device reads one prompt at a time, in the order that `admission.order` gives. Weights yield to
    who needs their room, the longest unused first, and never those of a busy model.

    Args:
        models: All models, by their numbers.
        clock: The simulated time.
        tally: What is counted.
        assumed: What no record says.
        first_token_seconds: What a first token takes beside the reading of its prompt.
    """

    def __init__(
        self,
        models: list[Model],
        clock: Clock,
        tally: Tally,
        assumed: Assumptions,
        first_token_seconds: float,
    ) -> None:
        self.models, self.clock, self.tally, self.assumed = models, clock, tally, assumed
        self.first_token_seconds = first_token_seconds

    def ask(self, model: Model, request: Request) -> None:
        """Take in a request for a model that is not cold."""
        if model.is_awake:
            self._join(model, request, AWAKE)
            return
        model.waiting.append(request)
        if model.state is State.UP and not model.is_waking:
            self.wake(model)

    def wake(self, model: Model) -> None:
        """Let a model's weights come back, as soon as they have room."""
        device = model.on
        model.is_waking = True
        if not device.make_room(model.weights_bytes, self.models):
            device.wakers.append(model)
            return
        device.free_bytes -= model.weights_bytes
        self.tally.count("wakes", self.clock.now)
        self.clock.after(model.wake_seconds, self._woken, model)

    def started(self, model: Model) -> None:
        """Let a model serve that has just started, with its weights if they have room."""
        if model.on.make_room(model.weights_bytes, self.models):
            model.on.free_bytes -= model.weights_bytes
            self._woken(model, COLD)
        elif model.waiting:
            self.wake(model)

    def _woken(self, model: Model, found: str = YIELDED) -> None:
        model.is_waking, model.is_awake = False, True
        waiting, model.waiting = model.waiting, []
        for request in waiting:
            is_older = request.at < model.up_since
            self._join(model, request, COLD if is_older else found)
        if not waiting:
            model.on.idle[model.number] = None

    def _join(self, model: Model, request: Request, found: str) -> None:
        """Let a request wait until its prompt is read."""
        device = model.on
        device.idle.pop(model.number, None)
        seconds = request.num_in * model.prompt_seconds + self.first_token_seconds
        ticket = Waiting(
            str(model.number), request.at, request.at + self.assumed.ttft_seconds, seconds
        )
        device.queue[ticket] = (request, found)
        self._read(device)

    def _read(self, device: Device) -> None:
        """Begin with the next prompt that has room for its KV."""
        if device.is_reading or not device.queue:
            return
        tickets = list(device.queue)
        if len(tickets) > 1:
            with deciding("order", self.tally):
                decided = order(tickets, self.clock.now)
                tickets = [*decided.kept, *decided.late]
        for ticket in tickets:
            request, found = device.queue[ticket]
            model = self.models[request.model]
            kv_bytes = (request.num_in + request.num_out) * model.token_bytes
            if device.make_room(kv_bytes, self.models):
                del device.queue[ticket]
                device.free_bytes -= kv_bytes
                device.is_reading = True
                self.clock.after(ticket.work, self._read_one, model, request, found, kv_bytes)
                return

    def _read_one(self, model: Model, request: Request, found: str, kv_bytes: int) -> None:
        """A first token: the next prompt is read, and this answer goes on."""
        goal = self.assumed.ttft_seconds
        self.tally.answered(found, request.at, self.clock.now - request.at, goal)
        seconds = request.num_out * self.assumed.tpot_seconds
        self.clock.after(seconds, self._answered, model, model.on, request, kv_bytes)
        model.on.is_reading = False
        self._read(model.on)

    def _answered(self, model: Model, device: Device, request: Request, kv_bytes: int) -> None:
        """A last token: its memory is free for others."""
        device.free_bytes += kv_bytes
        model.num_requests -= 1
        model.computed += request.num_in + request.num_out
        model.last_used = self.clock.now
        if model.num_requests == 0:
            device.idle[model.number] = None
        wakers = list(device.wakers)
        device.wakers.clear()
        for waker in wakers:
            self.wake(waker)
        self._read(device)
