"""An engine that is nothing but a port: free lists, a queue of cached blocks, and a loop."""

import logging
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from queue import Queue

from helpers.fake_weights import FakeWeights
from helpers.page_source import FakeBlock
from helpers.served import NUM_WEIGHT_PAGES, Request, Served, Weights
from helpers.waiting import PATIENCE_SECONDS
from kvcached_core.config import Config, WeightsMode
from kvcached_core.engine.engine import ElasticEngine
from kvcached_core.engine.free_lists import FreeLists
from kvcached_core.engine.instance import Instance
from kvcached_core.engine.pages import Pages
from kvcached_core.engine.placing import Placing, Planes
from kvcached_core.engine.ranks import Ranks
from kvcached_core.memory.devices import host_device
from kvcached_core.memory.orders import PageOrders
from kvcached_core.memory.rank import RankMemory
from kvcached_core.memory.seats import Seat
from kvcached_core.memory.vmm.host import HostBackend
from kvcached_core.weights.status import WeightStatus

BLOCK_BYTES, NUM_PLANES = 65536, 4  # 8 blocks a page


class FakeEngine(Served):
    """The engine under test, and the `EnginePort` of it.

    Args:
        config: The settings.
        block_bytes: Bytes of a block in one plane.
        num_planes: Planes of the pool.
        num_weight_pages: Pages of its weights, if the settings say that they yield.
        make_weights: Makes them.
    """

    def __init__(
        self,
        config: Config,
        block_bytes: int = BLOCK_BYTES,
        num_planes: int = NUM_PLANES,
        num_weight_pages: int = NUM_WEIGHT_PAGES,
        make_weights: Callable[[int, Seat, Config], Weights] = FakeWeights,
    ) -> None:
        super().__init__(config)
        device = host_device(config)
        instance = Instance(
            [device],
            config,
            name=config.name,
            default_name="",
            engine="fake",
            on_ring=lambda: self.engine.ring(),  # noqa: PLW0108  it is made below
        )
        placing = Placing(
            instance, config, device, logging.getLogger("fake"), length_setting="--length"
        )
        num_blocks = device.total_bytes // (num_planes * block_bytes)
        backend = HostBackend()
        geometry = placing.place(
            Planes(block_bytes, num_planes, num_blocks, request_blocks=1, block_tokens=(1,)),
            backend.granularity_bytes,
        )
        seat = instance.seat(device)
        self.memory = RankMemory(geometry, placing.num_pages, seat, backend)
        self.ranks = Ranks(instance, seat, instance.capacity_bytes)
        self.engine = ElasticEngine(self.ranks, self)
        blocks = [FakeBlock(geometry.block_id(number)) for number in range(num_blocks)]
        per_page = geometry.blocks_per_page
        self.free_lists: FreeLists[FakeBlock] = FreeLists(
            geometry,
            placing.num_pages,
            lambda page: blocks[page * per_page : (page + 1) * per_page],
        )
        low, high = config.spare_pages(device.kind)
        self.pages = Pages(
            geometry,
            placing.num_pages,
            self.ranks,
            self.free_lists,
            min_spare_pages=low,
            max_spare_pages=high,
            idle_seconds=config.idle_seconds,
        )
        self.engine.pools.append(self.pages)
        self.free_lists.take_one()  # the padding block
        self.cached: deque[FakeBlock] = deque()  # the longest unused first
        self.copies_freed = False  # what is freed may be copied until the next schedule has ended
        self.num_live = 0
        self._wakes: Queue[Callable[[], None]] = Queue()
        if config.weights is WeightsMode.YIELD:
            self.weights = make_weights(num_weight_pages, seat, config)
            assert self.engine.yield_weights(config)

    def allocate(self, request: Request, num_blocks: int) -> bool:
        """See `Served.allocate`."""
        if not self.engine.activation.is_active:
            return False
        if self.engine.giving.owed_pages and not self.engine.giving.pay():
            return False
        if self.engine.giving.is_debt_held and not request.num_held:
            return False
        missing = num_blocks - self.num_idle_blocks()
        if missing > 0:
            self.pages.promise_blocks(missing, is_urgent=True)
            if missing > self.pages.num_ready_blocks:
                return False
        self.pages.promise_blocks(num_blocks - self.free_lists.num_free)
        self.pages.open_blocks(num_blocks - self.free_lists.num_free)
        while self.free_lists.num_free < num_blocks:
            self._evict(self.cached.popleft())
        request.of_engine = [*(request.of_engine or []), *self.free_lists.take(num_blocks)]
        self.num_live += num_blocks
        return True

    def free(self, request: Request) -> None:
        """See `Served.free`."""
        blocks, request.of_engine = request.of_engine, None
        self.num_live -= len(blocks)
        if self.copies_freed:
            self.pages.freed_ids += [block.block_id for block in blocks]
        if request.is_cached:
            self.cached.extend(blocks)
            self.free_lists.add_cached(blocks)
        else:
            self.free_lists.give(blocks)

    def block_ids(self, request: Request) -> list[int]:
        """See `Served.block_ids`."""
        return [block.block_id for block in request.of_engine]

    def begin_schedule(self) -> None:
        """See `Served.begin_schedule`."""
        if self.has_requests and not self.engine.activation.is_active:
            self.engine.activation.activate()

    def end_schedule(self, step: Callable[[], None]) -> None:
        """See `Served.end_schedule`."""
        self.engine.settled()
        orders = self.engine.end_schedule()
        if orders is not None:
            self.memory.before_step(orders)
        step()
        if orders is not None:
            self.memory.after_step(orders)
        self.engine.between_steps()
        if not self.is_busy():
            self.engine.rest()

    def heed(self) -> None:
        """See `Served.heed`."""
        self._wakes.get(timeout=PATIENCE_SECONDS)()

    def sleep(self) -> None:
        """See `Served.sleep`."""
        self.engine.sleep()

    def waking(self, num_bytes: int) -> AbstractContextManager[None]:
        """See `Served.waking`."""
        return self.engine.room_to_wake(num_bytes, has_weights=True)

    @property
    def num_wakes(self) -> int:
        """How often its loop was woken and has not looked."""
        return self._wakes.qsize()

    @property
    def can_be_woken(self) -> bool:
        """See `EnginePort.can_be_woken`."""
        return True

    def is_busy(self) -> bool:
        """See `EnginePort.is_busy`."""
        return self.has_requests

    def is_live(self) -> bool:
        """See `EnginePort.is_live`."""
        return self.num_live > 0

    def num_waiting(self) -> int:
        """See `EnginePort.num_waiting`."""
        return len(self.waiting)

    def num_idle_blocks(self) -> int:
        """See `EnginePort.num_idle_blocks`."""
        return self.free_lists.num_free + len(self.cached)

    def carry_out(self, orders: PageOrders | None, *, wait: bool) -> None:
        """See `EnginePort.carry_out`."""
        if orders is not None:
            self.memory.apply(orders)
        if wait:
            self.memory.keeper.wait()

    def evict(self, num_pages: int) -> bool:
        """See `EnginePort.evict`."""
        num_blocks = min(num_pages * self.pages.geometry.blocks_per_page, len(self.cached))
        for _ in range(num_blocks):
            self._evict(self.cached.popleft())
        return num_blocks > 0

    def finish_copies(self) -> None:
        """See `EnginePort.finish_copies`: it makes none."""

    def num_locked_blocks(self, number: int) -> int:
        """See `EnginePort.num_locked_blocks`: it locks none."""
        return 0

    def end_copies(self) -> bool:
        """See `EnginePort.end_copies`: it makes none."""
        return False

    def publish(self) -> None:
        """See `EnginePort.publish`: nobody mirrors this cache."""

    def weight_status(self) -> WeightStatus | None:
        """See `EnginePort.weight_status`."""
        return self.weights.status if self.weights is not None else None

    def hold_weights(self, num_missing: int) -> WeightStatus:
        """See `EnginePort.hold_weights`."""
        assert self.weights is not None
        return self.weights.hold(self.weights.status.pages_without(num_missing))

    def wake(self, answer: Callable[[], None]) -> None:
        """See `EnginePort.wake`."""
        self._wakes.put(answer)

    def _evict(self, block: FakeBlock) -> None:
        self.free_lists.remove_cached([block])
        self.free_lists.give([block])
