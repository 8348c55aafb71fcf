"""The KV memory of one rank: its arena, the orders it carries out, and its part of the ledger."""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from kvcached_core.errors import (
    BackendError,
    ConfigError,
    LedgerError,
    OutOfMemoryError,
    PageKeeperError,
    UnmappedBlockError,
)
from kvcached_core.ledger.bell import wake
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.shortage import PATIENCE_SECONDS as ROOM_SECONDS
from kvcached_core.ledger.shortage import ask_peers
from kvcached_core.memory.arena import Arena
from kvcached_core.memory.geometry import Geometry
from kvcached_core.memory.joined_arenas import JoinedArenas
from kvcached_core.memory.keeper import PageChanges, PageKeeper
from kvcached_core.memory.mixed_arena import make_arena
from kvcached_core.memory.orders import PageOrders
from kvcached_core.memory.patience import keep_trying
from kvcached_core.memory.seats import Seat
from kvcached_core.memory.vmm.backend import Backend
from kvcached_core.units import format_bytes

logger = logging.getLogger("kvcached")

# How long a step waits for memory that was promised and that somebody outside the ledger took.
PATIENCE_SECONDS = 30.0
# How often who warms up asks again: the bell of its instance is the scheduler's.
ASK_SECONDS = 0.05


class RankMemory:
    """An arena with page 0 mapped; what becomes of its pages is reported to the ledger.

    Args:
        geometry: What lies in a page.
        num_pages: Pages of the pool's virtual size.
        seat: The instance's row in the ledger of the rank's device; page 0 is promised.
        backend: Where the memory comes from.
        current_stream: Returns the stream that the engine's steps are launched on.

    Raises:
        KVCachedError: If the ledger, the addresses or page 0 cannot be had; nothing is left behind.
    """

    def __init__(
        self,
        geometry: Geometry,
        num_pages: int,
        seat: Seat,
        backend: Backend,
        current_stream: Callable[[], int] = lambda: 0,
    ) -> None:
        self.seat = seat
        self.is_warming_up = False  # until `end_warm_up`, where an engine warms up on made-up ids
        self._pid = os.getpid()
        self.backend = backend
        self._current_stream = current_stream
        self._counts = (0, 0)
        with contextlib.ExitStack() as undo:
            self.ledger = Ledger(Path(seat.ledger_path))
            undo.callback(self.ledger.close)
            self.ledger.join(seat.row)
            self.arena = make_arena(self.backend, geometry, num_pages)
            undo.callback(self.arena.close)
            self._all: Arena | JoinedArenas = self.arena
            self.keeper = PageKeeper(self.arena, self._report)
            undo.callback(self.keeper.close)
            self.carry_out(PageOrders(map_pages=[0], num_used_pages=1))
            undo.pop_all()

    @property
    def addresses(self) -> str:
        """Which addresses of which process the last arena has, for an engine's log."""
        arena = self._all.arenas[-1]
        end = arena.address + arena.num_bytes
        return f"process {os.getpid()} has addresses {arena.address:#x} to {end:#x}"

    def add_arena(self, geometry: Geometry, num_pages: int) -> Arena:
        """Make an arena for a second pool, at the start; its page 0 is promised, and mapped.

        Its pages are as large as the first one's, and numbered behind them.

        Raises:
            KVCachedError: If the addresses or the page cannot be had.
        """
        arena = make_arena(self.backend, geometry, num_pages)
        self._all = self.keeper.arena = JoinedArenas(self.arena, arena)
        self.carry_out(PageOrders(map_pages=[self.arena.num_pages], num_used_pages=2))
        return arena

    def map_for_warm_up(self, block_ids: Iterable[int]) -> None:
        """Map what a warm-up step touches: the engine made its block ids up.

        Raises:
            ConfigError: If neighbours did not give the pages in the time that a start may take.
        """
        touched = {
            page
            for block_id in block_ids
            for page in self.arena.geometry.pages_touched(block_id)
            if page < self.arena.num_pages and not self.arena.is_resident(page)
        }
        self._await_promise(len(touched))
        self.carry_out(PageOrders(map_pages=sorted(touched), num_used_pages=1))

    def end_warm_up(self) -> None:
        """Give back what warm-up steps used."""
        self.is_warming_up = False
        pages = [page for page in self.arena.resident_pages if page != 0]
        self.carry_out(PageOrders(unmap_pages=pages, num_used_pages=1))

    def _await_promise(self, num_pages: int) -> None:
        """Have pages promised that no scheduler asked for."""
        page_bytes = self.arena.geometry.page_bytes
        missing_bytes = num_pages * page_bytes
        deadline = time.monotonic() + ROOM_SECONDS
        while missing_bytes:
            missing_bytes -= self.ledger.promise(self.seat.row, missing_bytes, page_bytes)
            if missing_bytes and time.monotonic() > deadline:
                raise ConfigError(
                    f"there is no room for what this engine warms up on: needed {num_pages} pages "
                    f"of {format_bytes(page_bytes)}, missing {format_bytes(missing_bytes)} on "
                    f"{self.ledger.device}; stop another engine, or raise KVCACHED_LIMIT if set"
                )
            if missing_bytes:
                ask_peers(self.ledger, self.seat.row, missing_bytes)
                time.sleep(ASK_SECONDS)

    def check_blocks(
        self, block_ids: Iterable[int], geometry: Geometry | None = None, first_page: int = 0
    ) -> None:
        """Refuse a step that names a block which is not mapped.

        Args:
            block_ids: The blocks that it reads or writes.
            geometry: That of their pool; None if there is only one.
            first_page: The number of their arena's page 0 among the pages of all arenas.

        Raises:
            UnmappedBlockError: With the block ids and their pages.
        """
        geometry = geometry or self.arena.geometry
        wrong = [
            block_id
            for block_id in block_ids
            if not geometry.exists(block_id)
            or not self._all.is_resident(first_page + geometry.page_of(block_id))
        ]
        if wrong:
            pages = sorted({geometry.page_of(block_id) for block_id in wrong})
            raise UnmappedBlockError(
                f"a step uses unmapped blocks {wrong[:8]} of pages {pages[:8]}"
            )

    def carry_out(self, orders: PageOrders) -> None:
        """Map and unmap, and return when it is done: only between steps."""
        self.apply(orders)
        self.keeper.wait()

    def zero(self) -> None:
        """Fill what is mapped with zeros when all orders are carried out: only between steps."""
        self.keeper.wait()
        self._all.zero()

    def apply(self, orders: PageOrders) -> None:
        """Carry out orders between two steps; only what the next one needs is waited for."""
        self.before_step(orders)
        self.after_step(orders)

    def before_step(self, orders: PageOrders) -> None:
        """Map what the step needs."""
        self.keeper.check()
        counts = orders.num_used_pages, orders.num_cached_pages
        has_new_counts, self._counts = counts != self._counts, counts
        if orders.map_pages or orders.ready_pages:
            self._map_now(orders.map_pages + orders.ready_pages)
        if has_new_counts and not orders.map_pages:
            self._report(PageChanges())

    def after_step(self, orders: PageOrders) -> None:
        """Begin with what the next steps will need, and let go of what none of them reads.

        Only when the step is launched: the thread that maps takes turns at the interpreter's lock
        with the launches, and a prefill has thousands. Pages are unmapped when the step is done.
        """
        if orders.spare_pages:
            self.keeper.map_soon(orders.spare_pages)
        if orders.unmap_pages:
            fence = self.backend.fence(self._current_stream())
            self.keeper.unmap_behind(orders.unmap_pages, fence)

    def close(self) -> None:
        """Give everything back; in a forked child, which owns nothing, do nothing."""
        if os.getpid() != self._pid:
            return
        with contextlib.ExitStack() as rest:
            rest.callback(self.ledger.close)
            with contextlib.suppress(PageKeeperError):  # it was logged, and raised to each step
                self.keeper.close()
            num_resident = len(self._all.resident_pages)
            with contextlib.suppress(BackendError):  # a device that failed has nothing to wait for
                self.backend.fence(self._current_stream()).wait()
            self._all.close()
            self._counts = (0, 0)
            with contextlib.suppress(LedgerError):  # the engine may have left, and with it the row
                self._report(PageChanges(num_unmapped=num_resident))

    def _map_now(self, pages: list[int]) -> None:
        def ask() -> None:
            self._report(PageChanges())  # so that the metrics say what failed
            wanted_bytes = len(pages) * self.arena.geometry.page_bytes
            ask_peers(self.ledger, self.seat.row, wanted_bytes)

        try:
            # The step is scheduled and its engine cannot take it back, so it waits.
            keep_trying(
                lambda: self.keeper.map_now(pages, self._current_stream()), ask, PATIENCE_SECONDS
            )
        except OutOfMemoryError:
            logger.exception(
                "kvcached: %d pages were promised and found no memory in %d s, so this "
                "engine ends; others than engines took it: raise KVCACHED_HEADROOM",
                len(pages),
                PATIENCE_SECONDS,
            )
            raise

    def _report(self, changes: PageChanges) -> None:
        page_bytes = self.arena.geometry.page_bytes
        num_used, num_cached = (count * self.seat.num_ranks for count in self._counts)
        waiting = self.ledger.settle(
            self.seat.row,
            mapped_bytes=changes.num_mapped * page_bytes,
            unmapped_bytes=changes.num_unmapped * page_bytes,
            unneeded_bytes=changes.num_spared * page_bytes,
            stuck_bytes=changes.num_stuck * page_bytes,
            used_bytes=num_used * page_bytes,
            cached_bytes=num_cached * page_bytes,
            map_times=self.arena.maps.take(),
            unmap_times=self.arena.unmaps.take(),
        )
        wake(self.ledger, waiting)
