"""The state of a simulated cluster: models, devices, and hosts; nothing here decides."""

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from enum import Enum

from scale.inputs import Request

from kvcached_gateway.policy.admission import Waiting
from kvcached_gateway.policy.demand import Demand
from kvcached_gateway.policy.eviction import Aging


class State(Enum):
    """What a model's engine does."""

    COLD = "cold"
    STARTING = "starting"
    UP = "up"


@dataclass(slots=True)
class Node:
    """A machine.

    Attributes:
        number: Which one.
        host_free_bytes: What of its memory neither processes nor copies hold.
        aging: What evictions left for later ones.
        up: Its models that start or are up.
    """

    number: int
    host_free_bytes: int
    aging: Aging = field(default_factory=Aging)
    up: "dict[int, Model]" = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Device:
    """A GPU.

    Attributes:
        id: Its name.
        node: Its machine.
        free_bytes: What neither residues, nor weights that are there, nor KV of requests hold.
        idle: Models whose weights are there and that have no request, the longest unused first.
        queue: Requests that wait for their prompt to be read, and what each found.
        is_reading: Whether it reads one.
        wakers: Models whose weights found no room, in order.
        starts_free_at: When its last start ends: one at a time.
    """

    id: str
    node: Node
    free_bytes: int
    idle: OrderedDict[int, None] = field(default_factory=OrderedDict)
    queue: dict[Waiting, tuple[Request, str]] = field(default_factory=dict)
    is_reading: bool = False
    wakers: "deque[Model]" = field(default_factory=deque)
    starts_free_at: float = 0.0

    def make_room(self, num_bytes: int, models: "list[Model]") -> bool:
        """Let idle weights yield until so much is free; none if that is not enough."""
        short_bytes = num_bytes - self.free_bytes
        victims = []
        for number in self.idle:
            if short_bytes <= 0:
                break
            victims.append(number)
            short_bytes -= models[number].weights_bytes
        if short_bytes > 0:
            return False
        for number in victims:
            del self.idle[number]
            models[number].is_awake = False
            self.free_bytes += models[number].weights_bytes
        return True


@dataclass(slots=True, eq=False)
class Model:
    """A model and its engine.

    Attributes:
        number: Its place in the list of all.
        weights_bytes: Its weights.
        token_bytes: KV of a token.
        prompt_seconds: What reading a token of a prompt takes.
        start_seconds: What a start takes.
        wake_seconds: What its weights take to come back.
        demand: What is asked of it, as the gateway measures it.
        computed: Tokens so far: what its engine's counter says.
        state: What its engine does.
        device: Where; None while it is cold.
        is_awake: Whether its weights are there.
        is_waking: Whether they come.
        num_requests: Those that it has.
        waiting: Those that wait until it is awake.
        up_since: Since when it is up.
        last_used: When its last request came or ended.
        moved_at: When it moved.
    """

    number: int
    weights_bytes: int
    token_bytes: int
    prompt_seconds: float
    start_seconds: float
    wake_seconds: float
    demand: Demand = field(default_factory=Demand)
    computed: int = 0
    state: State = State.COLD
    device: Device | None = None
    is_awake: bool = False
    is_waking: bool = False
    num_requests: int = 0
    waiting: list[Request] = field(default_factory=list)
    up_since: float = 0.0
    last_used: float = 0.0
    moved_at: float | None = None

    @property
    def on(self) -> Device:
        """The device of a model that is not cold."""
        if self.device is None:
            raise ValueError(f"model {self.number} is cold")
        return self.device

    def copy_bytes(self, process_bytes: int) -> int:
        """Return what it holds of the host while it is up."""
        return self.weights_bytes + process_bytes
