"""States of Mamba, linear attention and short convolutions: blocks in pages of their own arena.

SGLang has a slot for each request and for each cached prefix, in tensors of all layers. A slot is a
block of ours, and its layers' states are planes: those of one size a class. Pages of states are as
large as those of keys and values, and are counted, promised and given with them.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from math import prod
from typing import TYPE_CHECKING, Any

from kvcached_core.engine.demand import Demand
from kvcached_core.engine.placing import Planes
from kvcached_core.memory import stacked_tensors
from kvcached_core.memory.geometry import MAX_ID, Geometry
from kvcached_core.memory.size_classes import SizeClass
from kvcached_sglang.obstacles import states_config

if TYPE_CHECKING:
    from kvcached_sglang.engine import SglangEngine
    from kvcached_sglang.slots import SlotList

# Where kernels are that find a state of linear attention by 64 bits. Older ones, and some of those
# of convolutions, have 32: what lies behind so many elements of a plane they would not find.
_WIDE_KERNELS = "sglang.kernels.ops.attention.fla"


class States:
    """The states of one scheduler. Its thread calls this.

    Attributes:
        slots: The free ones, from the engine's last pool on.

    Args:
        engine: Whose they are.
    """

    def __init__(self, engine: "SglangEngine") -> None:
        self.slots: SlotList | None = None
        self._engine = engine
        self._allocator: Any = None
        self._geometry: Geometry | None = None
        self._per_request = 1

    def tell_size(self, runner: Any) -> None:
        """Let SGLang believe in as many states as there would be without keys and values.

        From this comes how many requests it lets run. How many there can be, `limit_requests` says.

        Args:
            runner: What plans the KV cache.
        """
        self._per_request = runner._calculate_mamba_ratio()
        state_bytes = states_config(runner).mamba2_cache_params.mamba_cache_per_req
        num_states = max(self._engine.virtual_bytes // state_bytes, self._per_request)
        if hasattr(runner, "_handle_max_mamba_cache"):
            from sglang.srt.runtime_context import get_context

            get_context().override("kvcached.states", max_mamba_cache_size=num_states)
        else:  # up to 0.5.15
            runner.server_args.max_mamba_cache_size = num_states

    def lay_out(self, make: Callable[[int], None], params: Any, num_layers: int) -> None:
        """Place the states, and let SGLang's pool make their tensors.

        Args:
            make: Makes the pool's tensors for so many slots, beside the one for padding.
            params: What SGLang says of a layer's state.
            num_layers: Layers that have one.

        Raises:
            KVCachedError: As `SglangEngine.place_planes`.
        """
        kinds = [(shape, params.dtype.conv) for shape in params.shape.conv]
        max_ids = min(MAX_ID // prod(shape) for shape, _ in kinds)
        temporal = params.shape.temporal
        if prod(temporal):
            kinds.append((temporal, params.dtype.temporal))
            if not _has_wide_kernels():
                max_ids = min(max_ids, MAX_ID // prod(temporal))
        numbers: Counter[int] = Counter()
        for shape, dtype in kinds:
            numbers[prod(shape) * dtype.itemsize] += num_layers
        first, *others = (SizeClass(size, numbers[size]) for size in sorted(numbers, reverse=True))
        self._geometry, arena = self._engine.place_planes(
            Planes(
                first.block_bytes,
                first.num_planes,
                num_blocks=0,
                request_blocks=self._per_request,
                block_tokens=(),
                is_exact=True,
                others=tuple(others),
                max_ids=max_ids,
            )
        )
        num_ids = self._geometry.num_ids(arena.num_pages)
        stacked_tensors.lay_out(lambda: make(num_ids - 1), self._geometry, arena)

    def add_allocator(self, allocator: Any) -> None:
        """Note who hands out the slots: it becomes elastic when there is a list of tokens."""
        if self._geometry is not None and self._allocator is None:
            self._allocator = allocator

    def make_elastic(self, number: int) -> None:
        """Let only slots of open pages be handed out.

        Args:
            number: Which of the engine's pools this is.
        """
        from kvcached_sglang.slots import make_elastic

        geometry, ours = self._geometry, self._engine
        assert geometry is not None  # noqa: S101
        make_pages = partial(ours.make_pages, geometry)
        self.slots = make_elastic(self._allocator, make_pages, ours, number)

    def demand(self, num_requests: int) -> Demand:
        """Return what the next batch takes at most, in slots, if it takes so many that wait."""
        num_set_aside = 0 if self.slots is None else self.slots.num_set_aside
        num_queued = num_set_aside + num_requests * self._per_request
        return Demand(0, num_queued, self._per_request if num_requests else 0, num_requests)

    def limit_requests(self, num_requests: int, tree_cache: Any) -> int:
        """Return how many more requests there are slots for, if they are at most so many.

        As many as SGLang plans for each: its own, those that it tracks, one for the prefix cache,
        and the cached one that it begins with, which cannot be dropped meanwhile.
        """
        if self.slots is None:
            return num_requests
        num_slots = self.slots.num_available_blocks() + evictable_states(tree_cache)
        return min(num_requests, num_slots // self._per_request)

    def set_aside(self, batches: Iterable[Any], tree_cache: Any) -> None:
        """Keep a slot for each prompt that was computed: it is cached when its outcome is seen.

        That is behind the schedule, where nothing is promised any more.

        Args:
            batches: Those of which the outcome was not looked at yet.
            tree_cache: SGLang's.
        """
        slots = self.slots
        if slots is None or self._per_request == 1:  # there is no cache
            return
        prompts = [each for each in batches if each is not None and each.forward_mode.is_extend()]
        slots.num_set_aside = sum(len(batch.reqs) for batch in prompts)
        slots.open(slots.num_set_aside)
        num_missing = slots.num_set_aside - slots.num_free_blocks
        if num_missing > 0:
            drop_states(tree_cache, num_missing)

    def check(self, scheduler: Any, batch: Any) -> None:
        """Refuse a batch that names a state which is not mapped: see `RankMemory.check_blocks`."""
        memory, slots = self._engine.memory, self.slots
        assert memory is not None  # noqa: S101
        if slots is not None:
            named = scheduler.req_to_token_pool.get_mamba_indices(batch.req_pool_indices).tolist()
            book = slots.pages.book
            memory.check_blocks(named, slots.pages.geometry, book.first_page)


def evictable_states(tree_cache: Any) -> int:
    """Return how many states only the prefix cache wants."""
    return int(tree_cache.mamba_evictable_size()) if tree_cache.supports_mamba() else 0


def drop_states(tree_cache: Any, num_states: int) -> None:
    """Drop so many cached states, the longest unused first, and keep keys and values."""
    from sglang.srt.mem_cache.base_prefix_cache import EvictParams

    if tree_cache.supports_mamba():
        tree_cache.evict(EvictParams(num_tokens=0, mamba_num=num_states))


def _has_wide_kernels() -> bool:
    try:
        return find_spec(_WIDE_KERNELS) is not None
    except ModuleNotFoundError:  # the packages around it are younger, too
        return False
