"""An engine over real ledgers and real memory, with a scheduler that does what a test says.

`Served` is what every engine under test has; a port to one engine says how that engine allocates,
frees and looks around. Sizes of requests are whole pages: the request that gets blocks first of
page 0 leaves the padding block out.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from helpers.waiting import await_that
from kvcached_core.config import Config
from kvcached_core.engine.engine import ElasticEngine
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.view import InstanceView
from kvcached_core.memory.rank import RankMemory
from kvcached_core.units import MIB
from kvcached_core.weights.status import WeightStatus

PAGE_BYTES = 2 * MIB
NUM_PAGES = 16  # of the device, and so of the pool of the engine under test
NUM_WEIGHT_PAGES = 4  # of an engine under test whose weights yield
ENGINE = "engine"
WORDS = ("used", "cached", "idle", "weights", "static", "promised", "asked", "coming")


def view_of(name: str, config: Config) -> InstanceView:
    """Return what the ledger says of an instance."""
    with Ledger(config.dir / "host.ledger") as ledger:
        return next(view for view in ledger.view().instances if view.name == name)


@dataclass
class Request:
    """What somebody wants of the engine under test.

    Attributes:
        name: What the test calls it.
        num_pages: Pages that it fills at first.
        is_cached: Whether its blocks stay in the prefix cache when it ends.
        num_blocks: Blocks that it needs now; None until it is scheduled for the first time.
        num_held: Blocks that it has.
        of_engine: What the engine knows it by.
        written: Blocks into which a step of it wrote.
    """

    name: str
    num_pages: int
    is_cached: bool
    num_blocks: int | None = None
    num_held: int = 0
    of_engine: Any = None
    written: set[int] = field(default_factory=set)


class Weights(Protocol):
    """The weights of the engine under test; a page of them is as large as one of the KV cache.

    Attributes:
        num_available: Pages that there is room for; a test may say that a stranger took it.
    """

    num_available: int

    @property
    def num_pages(self) -> int:
        """Pages of all of them."""

    @property
    def num_resident(self) -> int:
        """Pages that are there."""

    @property
    def status(self) -> WeightStatus:
        """What a worker says of them."""

    def hold(self, num_pages: int) -> WeightStatus:
        """See `EnginePort.hold_weights`."""

    def check(self) -> None:
        """Read all of them as a step does, and look whether they are right."""

    def close(self) -> None:
        """Give everything back."""


class Served(ABC):
    """The engine under test: what a port to it has to say, and what all have in common.

    A port's constructor makes `engine` and `memory`, with a pool of all pages of the host's.

    Attributes:
        block_tokens: Tokens of a block.

    Args:
        config: The settings; `KVCACHED_NAME` is `ENGINE`.
    """

    engine: ElasticEngine
    memory: RankMemory
    weights: Weights | None = None  # where they yield
    block_tokens = 1

    def __init__(self, config: Config) -> None:
        self.config = config
        self.running: list[Request] = []
        self.waiting: deque[Request] = deque()
        self._in_page_0: Request | None = None
        self._marks: dict[str, int] = {}

    @abstractmethod
    def allocate(self, request: Request, num_blocks: int) -> bool:
        """Give a request `num_blocks` more blocks, or none; return whether it got them."""

    @abstractmethod
    def free(self, request: Request) -> None:
        """Take a request's blocks; they stay cached if it says so."""

    @abstractmethod
    def block_ids(self, request: Request) -> list[int]:
        """Return the ids of the blocks that a request has."""

    @abstractmethod
    def begin_schedule(self) -> None:
        """Do what the engine does before it schedules."""

    @abstractmethod
    def end_schedule(self, step: Callable[[], None]) -> None:
        """Do what the engine does when it has scheduled: run `step`, and look around behind it."""

    @abstractmethod
    def heed(self) -> None:
        """Do what an engine in which nothing runs does when its bell is rung; wait for that."""

    @abstractmethod
    def sleep(self) -> None:
        """Do what the engine does before it sleeps."""

    @abstractmethod
    def waking(self, num_bytes: int) -> AbstractContextManager[None]:
        """Do what the engine does around a wake that allocates so many bytes."""

    def close(self) -> None:
        """End the engine and its worker."""
        self.memory.close()
        if self.weights is not None:
            self.weights.close()
        self.engine.close()

    @property
    def may_admit(self) -> bool:
        """Whether the engine lets requests in now."""
        return True

    @property
    def has_requests(self) -> bool:
        """Whether there are requests that run or wait."""
        return bool(self.running or self.waiting)

    @property
    def names(self) -> list[str]:
        """The requests that run."""
        return [request.name for request in self.running]

    def send(self, name: str, num_pages: int, *, is_cached: bool = False) -> None:
        """Let a request wait for the next schedule."""
        self.waiting.append(Request(name, num_pages, is_cached))

    def grow(self, name: str) -> None:
        """Let a running request need one more block in the next schedule."""
        (request,) = (one for one in self.running if one.name == name)
        request.num_blocks = request.num_held + 1

    def end(self, name: str) -> None:
        """End a request, whether it runs or waits."""
        for request in [*self.running, *self.waiting]:
            if request.name == name:
                if request in self.running:
                    self.running.remove(request)
                    self._drop(request)
                else:
                    self.waiting.remove(request)

    def turn(self, *, is_settled: bool = True) -> None:
        """Schedule once, run the step, and look around.

        Args:
            is_settled: Return when the workers are done; otherwise they go on behind this.
        """
        self.begin_schedule()
        is_short = self._schedule_running()
        while self.waiting and not is_short and self.may_admit:
            if not self._allocate(self.waiting[0]):
                break
            self.running.append(self.waiting.popleft())
        self.end_schedule(self._step)
        if is_settled:
            self.memory.keeper.wait()

    def num_blocks_of(self, request: Request) -> int:
        """Return how many blocks a request needs, those that it has included."""
        if request.num_blocks is not None:
            return request.num_blocks
        num_blocks = request.num_pages * self.engine.pools[0].geometry.blocks_per_page
        return max(num_blocks - (self._in_page_0 is None), 1)

    def expect(self, *, is_waiting: bool | None = False, **pages: int) -> None:
        """Assert what the ledger says of the engine, in pages; what is not named is 0.

        Args:
            is_waiting: Whether it waits for memory; None where engines may differ: one asks ahead
                for the next blocks of what runs.
            pages: How many are used, cached, idle, of weights, announced, promised, asked for,
                coming, and owed.
        """
        self.memory.keeper.wait()
        view = self.view()
        found = {word: getattr(view, f"{word}_bytes") // PAGE_BYTES for word in WORDS}
        found["owed"] = self.engine.giving.owed_pages
        expected = dict.fromkeys(found, 0) | pages
        assert found == expected, f"the ledger says {found}, expected {expected}"
        waits = view.waiting_bytes > 0
        assert is_waiting in {None, waits}, f"waits for {view.waiting_bytes} bytes"
        resident = self.memory.arena.resident_bytes
        if self.weights is not None:
            resident += self.weights.num_resident * PAGE_BYTES
        assert view.resident_bytes == resident, f"{view.resident_bytes}, mapped {resident}"

    def view(self) -> InstanceView:
        """Return what the ledger says of the engine."""
        return view_of(str(self.config.name), self.config)

    def hears(self) -> None:
        """Wait until the bell told a refused engine that there is memory now."""
        instance: Any = self.engine.ranks.instance
        refusals = instance._refusals
        await_that(lambda: max(refusals._until, refusals._asked_until) == 0)

    def _schedule_running(self) -> bool:
        """Let running requests have what they need; return whether one was stopped for it."""
        is_short = False
        for request in list(self.running):
            while request in self.running and not self._allocate(request):
                last = self.running.pop()
                self._drop(last)
                last.num_blocks = None
                self.waiting.appendleft(last)
                is_short = True
        return is_short

    def _allocate(self, request: Request) -> bool:
        num_blocks = self.num_blocks_of(request)
        missing = num_blocks - request.num_held
        if missing and not self.allocate(request, missing):
            return False
        if not request.num_held and self._in_page_0 is None:
            self._in_page_0 = request
        request.num_blocks = request.num_held = num_blocks
        return True

    def _drop(self, request: Request) -> None:
        self.free(request)
        request.num_held = 0
        request.written.clear()
        if self._in_page_0 is request:
            self._in_page_0 = None

    def _step(self) -> None:
        """Read from each block what was written there, and write into new ones: all are mapped."""
        if self.weights is not None and self.running:
            self.weights.check()
        whole, geometry = self.memory.arena.tensor(), self.engine.pools[0].geometry
        for request in self.running:
            mark = self._marks.setdefault(request.name, len(self._marks) + 1)
            for block in self.block_ids(request):
                page = geometry.page_of(block)
                assert self.memory.arena.is_resident(page), f"page {page} is not mapped"
                for plane in range(geometry.num_planes):
                    byte = whole[geometry.block_offset(plane, block)]
                    is_kept = block not in request.written or int(byte) == mark
                    assert is_kept, f"block {block} of {request.name} is another's"
                    byte.fill_(mark)
                request.written.add(block)
