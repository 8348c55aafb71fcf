"""An engine that is its own worker, and whose loop looks by itself: what it does in each turn."""

import logging
from collections.abc import Callable
from math import ceil
from typing import Any

from kvcached_core.config import Config
from kvcached_core.engine.batch_promise import BatchPromise
from kvcached_core.engine.counted_blocks import CountedBlocks
from kvcached_core.engine.engine import ElasticEngine
from kvcached_core.engine.instance import Instance
from kvcached_core.engine.joining import Group, join_ranks
from kvcached_core.engine.looping_port import LoopingPort
from kvcached_core.engine.pages import Pages
from kvcached_core.engine.places import Places
from kvcached_core.engine.placing import Placing, Planes, virtual_bytes
from kvcached_core.engine.ranks import NUM_IDLE_TURNS
from kvcached_core.memory.arena import Arena
from kvcached_core.memory.geometry import Geometry
from kvcached_core.memory.layer_tensors import PoolShape
from kvcached_core.memory.rank import RankMemory
from kvcached_core.memory.torch_device import find_device, make_backend

# How long a prompt of which a part is computed waits while nothing else runs; then it gives that
# part back, or two engines that hold a part each would wait for each other.
HOLD_SECONDS = 2.0

# A loop that does not sleep leaves the interpreter's lock for so long, in a turn that runs nothing,
# to the threads that map and unmap: they would have to wait for it twice a page.
STEP_ASIDE_SECONDS = 0.002


class LoopingEngine(ElasticEngine):
    """The memory of one scheduler process, from its first size to its end.

    Args:
        port: The engine.
        config: The settings.
        device: Where the KV cache lies, as torch names it.
        group: The ranks that share the model.
        name: What the instance is called when nobody named it.
        engine: The engine and its release.
        logger: The engine's: it shows no other.
        request_tokens: The longest request.
        length_setting: The engine's setting for it.
        num_pools: 1, or 2 where some layers have a pool of their own.
        num_arenas: See `Placing`.
        num_idle_turns: See `Ranks`.
        data_rank: See `Instance`.

    Raises:
        KVCachedError: As `join_ranks`.
    """

    port: LoopingPort
    can_counts_wait = True  # its loop comes again soon

    def __init__(
        self,
        port: LoopingPort,
        config: Config,
        device: Any,
        group: Group,
        *,
        name: str,
        engine: str,
        logger: logging.Logger,
        request_tokens: int,
        length_setting: str,
        num_pools: int = 1,
        num_arenas: int = 1,
        num_idle_turns: int = NUM_IDLE_TURNS,
        data_rank: int = 0,
    ) -> None:
        self.config = config
        self.device = find_device(device, config)
        ring = port.nap.ring
        ranks = join_ranks(
            self.device,
            group,
            lambda devices: Instance(
                devices, config, default_name=name, engine=engine, data_rank=data_rank, on_ring=ring
            ),
            num_idle_turns=num_idle_turns,
        )
        super().__init__(ranks, port)
        self.batch_promise = BatchPromise(port, self.promise, ranks.ask)
        self.placing = Placing(
            *(ranks, config, self.device, logger),
            length_setting=length_setting,
            num_pools=num_pools,
            num_arenas=num_arenas,
        )
        self._logger = logger
        self._places = Places(self.placing, ranks, make_backend(device), port.stream)
        self._request_tokens = request_tokens
        self._held_since: float | None = None
        self._due_seconds: float | None = None  # for its weights, as the last idle turn said
        self._room_pages = 0  # at the last schedule

    @property
    def memory(self) -> RankMemory | None:
        """This rank's, once the engine has made its first pool."""
        return self.port.memory

    @property
    def free_lists(self) -> list[CountedBlocks]:
        """The blocks of all pools, those of the pool of all layers first."""
        return self.port.free_lists

    @property
    def virtual_bytes(self) -> int:
        """What the engine is told that it has for its KV cache, in bytes."""
        return virtual_bytes(self.config, self.ranks.capacity_bytes, self.ranks.seat.num_ranks)

    def place(self, shape: PoolShape) -> tuple[Geometry, Arena]:
        """Choose a pool's geometry; with the first one make the arena, with page 0 mapped.

        The engine refuses a request that is longer than its pool, so none needs more.

        Raises:
            KVCachedError: As `Placing.place`.
        """
        longest_blocks = ceil(self._request_tokens / shape.block_tokens)
        self.port.block_tokens = shape.block_tokens
        return self.place_planes(
            Planes(
                *(shape.block_bytes, shape.num_planes, shape.num_blocks),
                min(longest_blocks, shape.num_blocks - 1),
                (shape.block_tokens,),
                is_exact=True,
                others=shape.others,
            )
        )

    def place_planes(self, planes: Planes) -> tuple[Geometry, Arena]:
        """As `place`, for a pool whose blocks may be something else than tokens.

        Raises:
            KVCachedError: As `Placing.place`.
        """
        place = self._places.add(planes)
        self.port.memory = memory = self._places.memory
        if memory is not None and place.is_new:
            self._logger.info("kvcached: %s", memory.addresses)
        return place.geometry, place.arena

    def make_pages(self, geometry: Geometry, blocks: CountedBlocks) -> Pages:
        """Return the pages of the next pool, that of all layers first, which has these blocks."""
        place = self._places.find(geometry)
        options = self.placing.page_options | self._places.page_options(place)
        if self.pools:
            options["num_quiet_pages"] = 0
        pages = Pages(geometry, place.arena.num_pages, self.ranks, blocks, **options)
        self.free_lists.append(blocks)
        self.pools.append(pages)
        return pages

    def before_schedule(self) -> None:
        """Give what others want, and take a promise of what this schedule may need at most."""
        if not self.pools:
            return
        port, ranks, room_pages = self.port, self.ranks, self._room_pages
        port.carry_out_later()
        is_busy = port.is_busy()
        is_asked = is_busy or port.is_pending()
        if is_asked and not self.activation.is_active and port.demand() is not None:
            self.activation.activate()  # before it looks: who has to wait is asked for its weights
        is_again = self.giving.is_awaiting and self._is_answer_due()
        wanted = ranks.look(is_busy=is_busy, is_again=is_again)
        self._room_pages = ranks.room_pages
        port.reopen(has_more=self._room_pages > room_pages)
        if wanted is not None or self.giving.is_awaiting:
            self._heed(wanted)
        self.pay()
        if self._held_since is not None and ranks.clock() > self._held_since + HOLD_SECONDS:
            self._held_since = None
            port.give_up_part()
        if is_asked and self.activation.is_active and (demand := port.demand()) is not None:
            self.batch_promise.take(demand)

    def stalled_bytes(self) -> int:
        """See `ElasticEngine`; all that are queued may need more than there ever is."""
        num_pages = min(self.ranks.refused_pages, self.placing.least_pages)
        return num_pages * self.pools[0].geometry.page_bytes

    def pay(self) -> None:
        """Give more of what is owed, at once: this schedule would take it."""
        self.giving.pay()
        if self.pools[0].book.orders:
            self._tell(wait=False, is_last=not self.giving.is_answer_due)

    def must_hold(self) -> bool:
        """Return whether no prompt may be computed now.

        One that was begun waits if its next part has no room, and a new one if a neighbour waits
        for what was asked of this engine and comes free next. All wait for the weights.
        """
        if not self.pools:
            return False
        if not self.activation.is_active:
            return True
        port = self.port
        num_needed = port.num_blocks_to_go_on()
        if num_needed is None:
            return self.giving.is_debt_held or (self.giving.is_yielding() and port.is_running())
        needed = [port.num_to_go_on(number, num_needed) for number in range(len(self.pools))]
        num_evictable_too = self.batch_promise.num_evictable_too
        if all(num_evictable_too(number) >= each for number, each in enumerate(needed)):
            self._held_since = None
            return False
        if self._held_since is None or port.is_running() or port.is_pending():
            self._held_since = self.ranks.clock()  # what runs will end, and free something
        return True

    def after_schedule(self, *, has_batch: bool) -> None:
        """Give back what was promised and not used, and map what the batch needs."""
        if not self.pools:
            return
        port = self.port
        for free_list in self.free_lists:
            free_list.is_bound = False
        port.has_batch = has_batch
        if (orders := self.end_schedule()) is not None:
            port.begin_step(orders)
        if has_batch:
            return
        port.carry_out_later()
        if self.ranks.is_waiting and port.num_waiting():
            port.show_waiting()
        if port.is_pending():
            return
        if not port.is_busy():
            self._due_seconds = self.activation.rest()
        if port.memory is not None:
            port.memory.keeper.wait(STEP_ASIDE_SECONDS)

    def sleep_until_rung(self, sleep: Callable[[], None]) -> None:
        """Tell what pages are for; let a loop that polls `port.nap` sleep if no copy is awaited."""
        if not self.giving.is_awaiting:
            if self.pools:
                self._send(self._take_orders(is_live=False))
            self._set_alarm(self._due_seconds)
            sleep()
            self.port.nap.end()

    def begin_batch(self) -> None:
        """Map what was opened since the schedule ended: no loop that is served opens anything."""
        if self.pools and self.pools[0].book.orders:
            self.port.begin_step(self._take_orders(is_live=True))
