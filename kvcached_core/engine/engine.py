"""One engine's scheduler and its memory, in no engine's words."""

import contextlib
from collections.abc import Hashable, Iterator, Sequence
from typing import TYPE_CHECKING

from kvcached_core.engine.activation import Activation
from kvcached_core.engine.arrival import warn_of
from kvcached_core.engine.giving import Giving
from kvcached_core.engine.leaving import close_with
from kvcached_core.engine.nap import seconds_until_due
from kvcached_core.engine.port import EnginePort
from kvcached_core.engine.ranks import Ranks, WantedPages
from kvcached_core.engine.starting import Start
from kvcached_core.engine.weights_kept import WeightsKept
from kvcached_core.errors import NoRoomError
from kvcached_core.memory.orders import PageOrders

if TYPE_CHECKING:
    from kvcached_core.config import Config
    from kvcached_core.engine.holds import Holds
    from kvcached_core.engine.pages import Pages


class ElasticEngine:
    """The scheduler's side of one engine: from its start to its end.

    What a schedule needs is promised before the engine allocates it, and the workers are told at
    its end what to map and unmap. Between two steps the engine gives memory back if it is asked to.
    The scheduler's thread calls it, but for `ring`.

    Attributes:
        activation: Whether its weights are there; a schedule has to look at `is_active` of it.
        close: Leaves the ledgers, and the host budget; what nobody has any more does by itself.

    Args:
        ranks: The engine in the ledgers.
        port: What the adapter says of its engine.
    """

    can_counts_wait = False  # of an idle engine: nobody may come again for long

    def __init__(self, ranks: Ranks, port: EnginePort) -> None:
        self.ranks = ranks
        self.port = port
        self.pools: list[Pages] = []  # that of all layers first
        self.activation = WeightsKept()
        self.giving = Giving(ranks, port, self.pools, self._tell)
        self._is_wake_pending = False
        self._open = contextlib.ExitStack()
        self._open.callback(ranks.close)
        self.close = close_with(self, self._open.close, is_at_exit=True)

    def yield_weights(self, config: "Config") -> bool:
        """Give weights, too, from now on; before the first schedule, on all ranks that schedule.

        Returns:
            Whether it does: the port says how much there is of them on all ranks.
        """
        status = self.ranks.merge(self.port.weight_status())
        if status is None:
            return False
        self.activation = Activation(self.ranks, self.port, status, config, self.sleep)
        self.giving.weights = self.activation
        return True

    @property
    def yields_weights(self) -> bool:
        """Whether it gives weights, too."""
        return isinstance(self.activation, Activation)

    def promise(self, num_blocks: Sequence[int]) -> None:
        """Have blocks ready in each pool; where there is less than all need, each has its share.

        Args:
            num_blocks: What each pool needs beside its free blocks.
        """
        if len(self.pools) > 1:
            self._share_room(num_blocks)
        for pages, number in zip(self.pools, num_blocks, strict=True):
            pages.promise_blocks(number, is_urgent=True)

    def end_schedule(self, *, is_last: bool = False) -> PageOrders | None:
        """Give back what a schedule was promised and did not use; return the workers' orders.

        Args:
            is_last: Nobody will call again soon, so surplus pages go now.
        """
        is_live = self.port.is_live()
        if self.ranks.is_waiting and self.ranks.end_schedule(is_busy=self.port.num_waiting() > 0):
            self.activation.note_refused(0 if is_live else self.stalled_bytes())
        for pages in self.pools:
            pages.end_schedule(is_live=is_live, is_last=is_last)
        orders = self._take_orders(is_live=is_live or self.can_counts_wait)
        if self.giving.has_paid:
            self._acknowledge(orders, is_last=False)
        return orders

    def stalled_bytes(self) -> int:
        """Return what each rank's KV cache lacks where requests found no memory."""
        return self.ranks.refused_pages * self.pools[0].geometry.page_bytes

    def between_steps(self) -> None:
        """Give back what others or the limit want, if they want something new, or holds ended."""
        if self.pools:
            is_again = self.giving.is_awaiting and self._is_answer_due()
            wanted = self.ranks.look(is_busy=False, is_again=is_again)
            if wanted is not None or self.giving.is_awaiting:
                self._heed(wanted)

    def answer(self, wanted: WantedPages) -> None:
        """Give back what others or the limit want, and note what is wished of the weights."""
        self.giving.give(wanted)
        if wanted.wish:
            self.activation.heed(wanted.wish)

    def rest(self) -> None:
        """Nothing runs any more: let surplus pages linger, and see to it that they go in time.

        What is owed still goes now: the last requests left it in the cache. An engine in its
        caller's process has no loop that could be woken, so all its surplus pages go now.
        """
        if not self.pools:
            return
        if self.ranks.is_waiting:
            self.ranks.clear_waiting()
        if self.giving.owed_pages:
            self.giving.pay()
            self.port.publish()
        weights_seconds = self.activation.rest()
        self.flush(is_last=not self.port.can_be_woken)
        self._set_alarm(weights_seconds)

    @property
    def holds(self) -> "Holds":
        """The pages that stay mapped for copies. There is a pool by now."""
        return self.pools[0].book.holds

    def release(self, holder: Hashable) -> None:
        """Let go of what a copy held, which all ranks have said to be over; see `Pages.hold`.

        No fence is needed beside the usual one: who unmaps has heard of the end of the copy. What
        is asked is looked at again between two steps.
        """
        self.holds.release(holder)

    def settled(self) -> None:
        """Let go of what was freed so far: copies of it hold it by now, or there will be none."""
        self.holds.settle()

    def finish_copies(self) -> None:
        """Wait until no copy is open, and let go of all holds: of what was freed none is begun.

        It comes before all is unmapped at once: by a reset of the cache, a sleep or the end.
        """
        if self.pools:
            if self.holds or self.ranks.is_one_of_many:  # ranks wait together, whoever has some
                self.port.finish_copies()
                self.holds.drop()
            if self.holds.is_due:
                self.between_steps()

    def flush(self, *, is_last: bool = False) -> None:
        """Carry out now, between two steps, what was decided.

        Args:
            is_last: Nobody will call again soon, so surplus pages go now.
        """
        self._send(self.end_schedule(is_last=is_last))

    def sleep(self) -> None:
        """Give everything back but page 0, weights too; return when it is done. No step runs."""
        self.empty()
        self.activation.sleep()

    def empty(self) -> None:
        """Give everything of the KV cache back but page 0; return when it is done."""
        self.finish_copies()
        if self.pools:
            self.ranks.clear_waiting()
            self.giving.close(sum(pages.num_resident_pages for pages in self.pools))
            self._send(self._take_orders(is_live=False), wait=True)
            self.port.publish()

    def make_room_for(self, static_bytes: int, start: Start) -> None:
        """Let neighbours make room for what a start allocates first: the weights, above all.

        Where there is not enough, the start goes on, and what it needs is promised to nobody else.
        """
        shortage = self.ranks.make_room(static_bytes, start)
        if shortage is not None:
            warn_of(shortage)

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """Have all weights there in the block: around what reads or writes them beside steps.

        Raises:
            NoRoomError: If neighbours do not give enough.
        """
        self.activation.activate_now()
        try:
            yield
        finally:
            if not self.port.is_busy():
                self.rest()

    @contextlib.contextmanager
    def room_to_wake(self, num_bytes: int, *, has_weights: bool = False) -> Iterator[None]:
        """Announce what a wake allocates beside the KV cache, and let neighbours make room for it.

        Until the end of the block nobody else is promised these bytes. Every rank has to call it,
        one that allocates nothing as well: the largest number of all ranks counts.

        Args:
            num_bytes: What this rank allocates, in bytes.
            has_weights: Whether weights that were given come back, too; they do before the block.

        Raises:
            NoRoomError: If neighbours do not give enough; nothing was allocated then.
        """
        if has_weights:
            self.activation.activate_now()
        shortage = self.ranks.make_room(num_bytes)
        if shortage is not None:
            if has_weights and not self.port.is_busy():
                self.rest()  # they came for nothing
            raise NoRoomError(
                f"kvcached: there is no room to wake up: {shortage}; this engine stays asleep, and "
                "may be woken when others need less"
            )
        try:
            yield
        finally:
            self.ranks.announce(0)

    def ring(self) -> None:
        """Have an idle engine look what is asked of it; from any thread.

        A busy engine looks after its step. One call is enough for all rings until it comes, since
        it looks at what all of them asked.
        """
        if self.pools and self.port.can_be_woken and not self._is_wake_pending:
            self._is_wake_pending = True
            self.port.wake(self.answer_ring)

    def answer_ring(self) -> None:
        """Look, in the engine's own thread: `port.wake` brought it here."""
        self._is_wake_pending = False  # before it looks: who rings from now on is heard again
        self.between_steps()
        if not self.port.is_busy():
            self.rest()
        elif not self.activation.is_active:
            self.activation.activate()

    def _set_alarm(self, weights_seconds: float | None) -> None:
        if (seconds := seconds_until_due(self.pools, weights_seconds)) is not None:
            self.ranks.set_alarm(seconds)

    def _share_room(self, num_blocks: Sequence[int]) -> None:
        needed = [pages.num_lacking(n) for pages, n in zip(self.pools, num_blocks, strict=True)]
        room_pages, num_pages = self.ranks.room_pages, sum(needed)
        if num_pages > room_pages:
            for pages, number in zip(self.pools, needed, strict=True):
                pages.promise(room_pages * number // num_pages, is_urgent=True)

    def _is_answer_due(self) -> bool:
        return self.holds.is_due and self.giving.is_answer_due

    def _heed(self, wanted: WantedPages | None) -> None:
        if wanted is not None:
            self.answer(wanted)
        elif self.holds.is_due:
            self.giving.go_on()
            self._tell(wait=False, is_last=False)
            self.port.publish()

    def _tell(self, *, wait: bool, is_last: bool) -> None:
        orders = self._take_orders(is_live=self.port.is_live())
        self._acknowledge(orders, is_last=is_last)
        self._send(orders, wait=wait)

    def _acknowledge(self, orders: PageOrders | None, *, is_last: bool) -> None:
        # Before the orders: to unmap takes from what is announced here.
        self.giving.has_paid = False
        self.ranks.acknowledge(len(orders.unmap_pages) if orders else 0, is_last=is_last)

    def _send(self, orders: PageOrders | None, *, wait: bool = False) -> None:
        if orders is not None or wait:
            self.port.carry_out(orders, wait=wait)

    def _take_orders(self, *, is_live: bool) -> PageOrders | None:
        return self.pools[0].book.take_orders(self._count_pages, is_live=is_live)

    def _count_pages(self) -> tuple[int, int]:
        counts = [pages.count_pages() for pages in self.pools]
        is_page_0_shared = not self.pools[0].has_page_0  # by several pools: it is none of theirs
        return sum(used for used, _ in counts) + is_page_0_shared, sum(held for _, held in counts)
