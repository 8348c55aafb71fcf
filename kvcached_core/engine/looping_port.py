"""What an adapter says of an engine whose loop looks by itself and which is its own worker."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from kvcached_core.engine.demand import Demand
from kvcached_core.engine.nap import Nap
from kvcached_core.memory.orders import PageOrders

if TYPE_CHECKING:
    from kvcached_core.engine.counted_blocks import CountedBlocks
    from kvcached_core.memory.rank import RankMemory
    from kvcached_core.weights.rank import RankWeights
    from kvcached_core.weights.status import WeightStatus


class LoopingPort(ABC):
    """An `EnginePort`, and what `LoopingEngine` asks beside. The scheduler's thread calls it.

    Attributes:
        can_be_woken: Its loop looks by itself, and sleeps until somebody rings at most.
        nap: What such a loop polls beside its own.
        has_batch: Whether the last schedule made a batch.
        memory: This rank's, from the engine's first pool on.
        weights: This rank's, where they yield.
        block_tokens: Tokens of a block, from then on.
        free_lists: The blocks of each pool, those of the pool of all layers first.
    """

    can_be_woken = True

    def __init__(self) -> None:
        self.nap = Nap()
        self.has_batch = False
        self.memory: RankMemory | None = None
        self.weights: RankWeights | None = None
        self.block_tokens = 1
        self.free_lists: list[CountedBlocks] = []
        self._later: PageOrders | None = None  # of which a part waits for the launches

    @abstractmethod
    def stream(self) -> int:
        """Return the stream on which batches run."""

    @abstractmethod
    def is_busy(self) -> bool:
        """See `EnginePort.is_busy`."""

    @abstractmethod
    def is_running(self) -> bool:
        """Return whether requests are decoded, which will end and free something."""

    @abstractmethod
    def is_pending(self) -> bool:
        """Return whether there is a batch of which the outcome was not looked at yet."""

    @abstractmethod
    def num_waiting(self) -> int:
        """See `EnginePort.num_waiting`."""

    @abstractmethod
    def demand(self) -> Demand | None:
        """Return what the next batch takes of the pool of all layers; None while it sleeps."""

    def demand_of(self, number: int, demand: Demand) -> Demand:
        """Return what the next batch takes of the pool with this number, where that is `demand`.

        Of a pool of windows as much; but what leaves a window comes back, so a request never needs
        all of its tokens there.
        """
        return replace(demand, num_least=0) if number else demand

    @abstractmethod
    def num_blocks_to_go_on(self) -> int | None:
        """Return what the next part of a prompt needs that was begun; None if there is none.

        It is told in blocks of the pool of all layers.
        """

    def num_to_go_on(self, number: int, num_blocks: int) -> int:  # noqa: ARG002  each the same here
        """Return what it needs of the pool with this number, where that is `num_blocks`."""
        return num_blocks

    @abstractmethod
    def give_up_part(self) -> None:
        """Send a prompt of which a part is computed back to the queue, and free that part."""

    @abstractmethod
    def reopen(self, *, has_more: bool) -> None:
        """Let requests in again after one found no memory.

        Args:
            has_more: Whether there is more memory than before, as a neighbour gave some.
        """

    @abstractmethod
    def num_cached_blocks(self, number: int) -> int:
        """Return the blocks that only the prefix cache wants in the pool with this number."""

    def num_unneeded_blocks(self, number: int) -> int:
        """Return about how many blocks of a pool no request needs.

        A cached one that is locked for a copy goes when that has ended, so who asks may count on
        it. One of a request counts, too, while it is copied.
        """
        return self.num_cached_blocks(number) + self.num_locked_blocks(number)

    @abstractmethod
    def drop_cached(self, num_blocks: int) -> None:
        """Drop so many cached blocks of the pool of all layers, the longest unused ones."""

    def show_waiting(self) -> None:  # noqa: B027  an engine may show it by itself
        """Say in the engine's metrics that requests wait; called in each turn without a batch."""

    def is_live(self) -> bool:
        """See `EnginePort.is_live`."""
        return self.has_batch or self.is_running()

    def num_idle_blocks(self) -> int:
        """See `EnginePort.num_idle_blocks`: of the pool of all layers."""
        return self.free_lists[0].num_free_blocks + self.num_cached_blocks(0)

    def carry_out(self, orders: PageOrders | None, *, wait: bool) -> None:
        """See `EnginePort.carry_out`."""
        self.begin_step(orders)
        self.carry_out_later()
        if wait and self.memory is not None:
            self.memory.keeper.wait()

    def begin_step(self, orders: PageOrders | None) -> None:
        """Map what the next step needs; the rest would hold its launches up, and waits for them."""
        self.carry_out_later()
        if orders is not None and self.memory is not None:
            self._later = orders
            self.memory.before_step(orders)

    def carry_out_later(self) -> None:
        """Begin with what waited for the launches of the last step."""
        if self._later is not None and self.memory is not None:
            orders, self._later = self._later, None
            self.memory.after_step(orders)

    def evict(self, num_pages: int) -> bool:
        """See `EnginePort.evict`."""
        if not self.num_cached_blocks(0):
            return False
        before = self._count_free()
        self.drop_cached(num_pages * self.free_lists[0].pages.geometry.blocks_per_page)
        return self._count_free() != before

    def finish_copies(self) -> None:  # noqa: B027  an engine may make none
        """See `EnginePort.finish_copies`."""

    def num_locked_blocks(self, number: int) -> int:  # noqa: ARG002  see its docstring
        """See `EnginePort.num_locked_blocks`: an engine may make no copies."""
        return 0

    def end_copies(self) -> bool:
        """See `EnginePort.end_copies`: an engine may make none."""
        return False

    def publish(self) -> None:  # noqa: B027  there is nothing to do
        """See `EnginePort.publish`: the engine's loop does it, also in a turn that runs nothing."""

    def weight_status(self) -> "WeightStatus | None":
        """See `EnginePort.weight_status`."""
        return self.weights.status() if self.weights is not None else None

    def hold_weights(self, num_missing: int) -> "WeightStatus":
        """See `EnginePort.hold_weights`."""
        assert self.weights is not None  # noqa: S101
        return self.weights.hold(self.weights.status().pages_without(num_missing))

    def finish_weights(self) -> None:
        """See `EnginePort.finish_weights`."""
        if self.weights is not None:
            self.weights.arriving.finish()

    def wake(self, answer: Callable[[], None]) -> None:  # noqa: B027  as above
        """See `EnginePort.wake`: its loop is awake, or will be rung for."""

    def _count_free(self) -> Sequence[int]:
        return [free_list.num_free_blocks for free_list in self.free_lists]
