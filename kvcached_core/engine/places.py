"""The arenas of an engine that is its own worker: one for all of its pools, or one for each."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from kvcached_core.engine.holds import Holds
from kvcached_core.engine.page_book import PageBook
from kvcached_core.engine.pages import NUM_QUIET_PAGES
from kvcached_core.engine.placing import Placing, Planes
from kvcached_core.engine.ranks import Ranks
from kvcached_core.engine.telling import Share
from kvcached_core.errors import UnsupportedEngineError
from kvcached_core.memory.arena import Arena
from kvcached_core.memory.geometry import Geometry
from kvcached_core.memory.orders import PendingOrders
from kvcached_core.memory.rank import RankMemory
from kvcached_core.memory.vmm.backend import Backend


@dataclass(frozen=True)
class Place:
    """Where one pool lies.

    Attributes:
        geometry: What lies in a page.
        arena: Its pages.
        first_page: The number of the arena's page 0 among the pages of all arenas.
        is_new: Whether the arena was made for this pool.
    """

    geometry: Geometry
    arena: Arena
    first_page: int
    is_new: bool


def planes_of_all(planes: Planes, most: Share) -> Planes:
    """Return the planes of the rank that has most: ids and pages are the same on all of them.

    One with fewer layers leaves a part of each page empty.

    Args:
        planes: This rank's.
        most: Returns the largest of each number that a rank has.

    Raises:
        UnsupportedEngineError: If ranks differ in more than how many planes they have.
    """
    size, whole = planes.block_bytes, planes.whole_bytes
    own = [planes.num_planes, whole, -whole, size, -size, int(bool(planes.others))]
    num_planes, largest, least, largest_size, least_size, has_others = most(own)
    if largest == -least:
        return planes
    if has_others or largest_size != -least_size:
        raise UnsupportedEngineError(
            "layers that differ in block size, and stages that differ in layers: nobody has tried "
            "it; use one stage"
        )
    return replace(planes, num_planes=num_planes)


class Places:
    """Makes the arenas, and says where the pages of each pool are. The scheduler's thread calls it.

    Args:
        placing: Which sizes the pools have.
        ranks: The engine in the ledgers.
        backend: Where memory comes from.
        stream: Returns the stream on which batches run.

    Attributes:
        memory: This rank's, from the first pool on.
    """

    def __init__(
        self, placing: Placing, ranks: Ranks, backend: Backend, stream: Callable[[], int]
    ) -> None:
        self.memory: RankMemory | None = None
        self._placing = placing
        self._ranks = ranks
        self._backend = backend
        self._stream = stream
        self._places: list[Place] = []
        self._orders, self._holds = PendingOrders(), Holds()  # of all arenas
        self._shared: PageBook | None = None  # that of two pools in one arena

    def add(self, planes: Planes) -> Place:
        """Choose a pool's geometry, and make its arena, with page 0 mapped, if it has one alone.

        Raises:
            KVCachedError: As `Placing.place`.
            UnsupportedEngineError: If ranks differ in more than how many planes they have.
        """
        planes = planes_of_all(planes, self._ranks.most)
        seat, is_shared = self._ranks.seat, self._placing.is_shared
        geometry = self._placing.place(planes, self._backend.granularity_bytes, seat.num_ranks)
        num_pages = self._placing.pages_of(planes, geometry)
        first_page = 0
        if self.memory is None:
            self.memory = RankMemory(geometry, num_pages, seat, self._backend, self._stream)
            arena = self.memory.arena
            if is_shared:
                self._shared = PageBook(num_pages, self._ranks.clock)
        elif is_shared:
            arena = self.memory.arena
        else:
            first_page = self.memory.arena.num_pages
            arena = self.memory.add_arena(geometry, num_pages)
        is_new = not (is_shared and self._places)
        self._places.append(Place(geometry, arena, first_page, is_new))
        return self._places[-1]

    def find(self, geometry: Geometry) -> Place:
        """Return where the pool lies that got this geometry."""
        (found,) = (each for each in self._places if each.geometry is geometry)
        return found

    def page_options(self, place: Place) -> dict[str, Any]:
        """Return what `Pages` of a pool is told of its arena.

        Where each pool has an arena, page 0 of each stays, and so no page that is empty does.
        """
        num_pages, clock = place.arena.num_pages, self._ranks.clock
        has_page_0_alone = self._placing.is_shared or len(self._places) == 1
        return {
            "num_quiet_pages": NUM_QUIET_PAGES if has_page_0_alone else 0,
            "shared": self._shared,
            "book": PageBook(num_pages, clock, self._orders, place.first_page, self._holds),
            "clock": clock,
        }
