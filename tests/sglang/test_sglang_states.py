"""SGLang's states of mamba and its like, over our arena: each is its own, and comes and goes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.sglang_elastic import hooked, let_schedule, make_allocator, make_engine, tell
from sglang.srt.configs.mamba_utils import Mamba2StateDType
from sglang.srt.mem_cache.allocator.mamba import MambaSlotAllocator
from sglang.srt.mem_cache.memory_pool import MambaPool

from kvcached_core.engine.ranks import WantedPages
from kvcached_core.errors import UnmappedBlockError
from kvcached_core.memory.size_classes import MixedGeometry
from kvcached_core.units import MIB
from kvcached_sglang import obstacles, state_hooks, states

pytestmark = pytest.mark.sglang

PAGE_BYTES = 24 * MIB
NUM_PAGES = 20
LAYERS = [0, 2, 4]
PER_REQUEST = 3
# 192 KiB and 12 KiB a layer: 39 states a page, with a handle of 22 MiB and one of 2 MiB.
CONV, TEMPORAL = (1536, 4), (12, 64, 64)


def params(temporal: tuple[int, ...] = TEMPORAL) -> Any:
    return SimpleNamespace(
        shape=SimpleNamespace(conv=[CONV], temporal=temporal),
        dtype=Mamba2StateDType(conv=torch.bfloat16, temporal=torch.float32),
        is_kda=False,
        mamba_cache_per_req=1,
    )


def make_pool(size: int, temporal: tuple[int, ...] = TEMPORAL) -> MambaPool:
    return MambaPool(
        size=size,
        spec_state_size=0,
        cache_params=params(temporal),
        mamba_layer_ids=LAYERS,
        device="cpu",
    )


class Cache:
    """A prefix cache that has states alone, each of one token."""

    def __init__(self) -> None:
        self.slots: list[torch.Tensor] = []
        self.free: Any = None

    def supports_mamba(self) -> bool:
        return True

    def supports_swa(self) -> bool:
        return False

    def full_evictable_size(self) -> int:
        return 0

    def mamba_evictable_size(self) -> int:
        return len(self.slots)

    def evict(self, params: Any) -> None:
        for _ in range(min(params.mamba_num, len(self.slots))):
            self.free(self.slots.pop(0))


class Hybrid:
    """An engine with states beside keys and values, SGLang's pool of them, and its allocator."""

    def __init__(self, directory: Path, temporal: tuple[int, ...] = TEMPORAL) -> None:
        self.engine = make_engine(
            directory,
            num_pools=2,
            has_states=True,
            host_pool=PAGE_BYTES * NUM_PAGES,
            page_bytes=PAGE_BYTES,
        )
        kept = self.engine.states
        assert kept is not None
        self.states = kept
        self.states._per_request = PER_REQUEST
        self.cache = Cache()
        with hooked(
            self.engine,
            (MambaPool, "__init__", state_hooks.mamba_pool_init),
            (MambaSlotAllocator, "__init__", state_hooks.slot_allocator_init),
        ):
            self.pool = make_pool(40, temporal)
            self.allocator = MambaSlotAllocator(40, "cpu")
            self.tokens = make_allocator(self.engine, 1000)
        self.cache.free = self.allocator.free
        let_schedule(self.engine, self.cache)
        self.look()

    @property
    def slots(self) -> Any:
        return self.states.slots

    @property
    def memory(self) -> Any:
        return self.engine.memory

    def look(self) -> None:
        self.memory.keeper.wait()
        self.engine.ranks.look()

    def take(self, number: int) -> torch.Tensor:
        self.look()
        found = self.allocator.alloc(number)
        assert found is not None
        tell(self.engine)
        return found

    def write(self, slots: torch.Tensor, value: float) -> None:
        for tensor in (*self.pool.mamba_cache.conv, self.pool.mamba_cache.temporal):
            for layer in tensor:
                layer[slots] = value

    def has(self, slots: torch.Tensor, value: float) -> bool:
        tensors = (*self.pool.mamba_cache.conv, self.pool.mamba_cache.temporal)
        return all(bool((layer[slots] == value).all()) for tensor in tensors for layer in tensor)

    def close(self) -> None:
        self.pool.mamba_cache.conv.clear()
        keys = self.tokens.get_kvcache()
        keys.k_buffer.clear()
        keys.v_buffer.clear()
        self.memory.close()
        self.engine.close()


@contextmanager
def hybrid(directory: Path, **options: Any) -> Iterator[Hybrid]:
    made = Hybrid(directory, **options)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def ours(tmp_path: Path) -> Iterator[Hybrid]:
    with hybrid(tmp_path / "kv") as made:
        yield made


def test_states_of_two_sizes_lie_in_pages_as_large_as_those_of_keys_and_values(
    ours: Hybrid,
) -> None:
    of_states, of_tokens = ours.engine.placing.geometries
    assert isinstance(of_states, MixedGeometry)
    sizes = [(each.block_bytes, each.num_planes) for each in of_states.classes]
    assert sizes == [(192 * 1024, 3), (12 * 1024, 3)]
    assert of_states.page_bytes == of_tokens.page_bytes
    assert ours.pool.size == ours.allocator.size == of_states.num_ids(NUM_PAGES) - 1
    assert ours.memory.keeper.arena.resident_pages == [0, ours.memory.arena.num_pages]
    for tensor in (*ours.pool.mamba_cache.conv, ours.pool.mamba_cache.temporal):
        for layer in tensor:
            assert layer.is_contiguous()  # what SGLang's compiled kernels ask for


def test_each_state_is_its_own_and_a_copy_is_what_was_copied(ours: Hybrid) -> None:
    per_page = ours.slots.pages.geometry.blocks_per_page
    taken = [ours.take(per_page) for _ in range(3)]
    assert all(ours.has(slots, 0.0) for slots in taken)
    for number, slots in enumerate(taken):
        ours.write(slots, number + 1.0)
    assert all(ours.has(slots, number + 1.0) for number, slots in enumerate(taken))
    ours.pool.copy_from(taken[2], taken[0])
    ours.pool.clear_slots(taken[1])
    assert [ours.has(taken[n], value) for n, value in ((0, 3.0), (1, 0.0), (2, 3.0))] == [True] * 3


def test_a_state_of_another_page_is_not_what_was_written(ours: Hybrid) -> None:
    slots = ours.take(1)
    ours.write(slots, 5.0)
    geometry = ours.slots.pages.geometry
    ours.take(2 * geometry.blocks_per_page)
    assert not ours.has(slots + geometry.ids_per_page, 5.0)


def test_pages_of_states_go_when_they_are_free_and_count_with_the_others(ours: Hybrid) -> None:
    per_page = ours.slots.pages.geometry.blocks_per_page
    slots = ours.take(3 * per_page)
    tokens = ours.tokens.alloc(10)
    tell(ours.engine)
    num_before = len(ours.memory.keeper.arena.resident_pages)
    assert num_before >= 5
    ours.allocator.free(slots)
    ours.tokens.free(tokens)
    ours.engine.empty()
    assert ours.memory.keeper.arena.resident_pages == [0, ours.memory.arena.num_pages]
    again = ours.take(1)
    assert ours.has(again, 0.0)


def test_cached_states_go_to_a_neighbour(ours: Hybrid) -> None:
    per_page = ours.slots.pages.geometry.blocks_per_page
    ours.cache.slots.extend(ours.take(2 * per_page).split(1))
    held = ours.take(1)
    ours.write(held, 7.0)
    _, cached = ours.engine._count_pages()
    assert cached == 2
    ours.engine.giving.give(WantedPages(NUM_PAGES, 0))
    ours.memory.keeper.wait()
    assert ours.cache.slots == []
    assert ours.has(held, 7.0)
    (page,) = (held // ours.slots.pages.geometry.ids_per_page).tolist()
    assert sorted(ours.memory.keeper.arena.resident_pages) == [0, page, NUM_PAGES]


def test_what_a_running_prompt_will_cache_is_neither_given_nor_counted_on(ours: Hybrid) -> None:
    num_prompts = ours.slots.pages.geometry.blocks_per_page + 8  # the page of state 0 has fewer
    is_prompt = SimpleNamespace(is_extend=lambda: True)
    batch = SimpleNamespace(reqs=[None] * num_prompts, forward_mode=is_prompt)
    num_slots = ours.slots.num_available_blocks()
    ours.states.set_aside((batch, None), ours.cache)
    tell(ours.engine)
    assert ours.states.limit_requests(1000, ours.cache) == (num_slots - num_prompts) // PER_REQUEST
    ours.engine.giving.give(WantedPages(NUM_PAGES, 0))
    ours.memory.keeper.wait()
    assert ours.slots.num_free_blocks >= num_prompts
    assert len(ours.allocator.alloc(num_prompts)) == num_prompts
    ours.states.set_aside((None,), ours.cache)
    assert ours.slots.num_set_aside == 0


def test_no_more_requests_come_in_than_there_are_states_for(ours: Hybrid) -> None:
    per_page = ours.slots.pages.geometry.blocks_per_page
    ours.look()
    num_slots = ours.slots.num_available_blocks()
    assert num_slots >= (NUM_PAGES - 2) * per_page
    assert ours.states.limit_requests(1000, ours.cache) == num_slots // PER_REQUEST
    assert ours.states.limit_requests(2, ours.cache) == 2
    ours.engine.giving.owed_pages = 1
    assert ours.states.limit_requests(1000, ours.cache) == 0


def test_a_batch_that_names_a_state_which_is_not_mapped_is_refused(ours: Hybrid) -> None:
    slots = ours.take(2)
    pool = SimpleNamespace(get_mamba_indices=lambda rows: rows)
    scheduler = SimpleNamespace(req_to_token_pool=pool)
    ours.states.check(scheduler, SimpleNamespace(req_pool_indices=slots))
    beyond = slots + 3 * ours.slots.pages.geometry.ids_per_page
    with pytest.raises(UnmappedBlockError):
        ours.states.check(scheduler, SimpleNamespace(req_pool_indices=beyond))


def test_convolutions_alone_have_one_size(tmp_path: Path) -> None:
    with hybrid(tmp_path / "kv", temporal=(1, 64, 0)) as made:
        of_states, _ = made.engine.placing.geometries
        assert [each.num_planes for each in of_states.classes] == [3]
        slots = made.take(5)
        made.write(slots, 2.0)
        assert made.has(slots, 2.0)


def test_there_are_no_more_states_than_kernels_can_find(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(states, "MAX_ID", 9000 * 1536 * 4)
    with hybrid(tmp_path / "kv", temporal=(1, 64, 0)) as made:
        of_states, _ = made.engine.placing.geometries
        assert of_states.num_ids(NUM_PAGES) > 9000
        assert of_states.num_ids(made.slots.pages.num_pages) <= 9000


@pytest.mark.parametrize(
    "name",
    [
        "enable_linear_replayssm",
        "enable_linear_replayssm_spec",
        "enable_int8_mamba_checkpoint",
    ],
)
def test_what_lies_beside_states_is_refused_by_name(name: str) -> None:
    arguments = SimpleNamespace(max_mamba_cache_size=None, **{name: True})
    runner = SimpleNamespace(
        server_args=arguments, mambaish_config=SimpleNamespace(), is_hybrid_swa=False
    )
    (reason,) = obstacles._state_obstacles(runner)
    assert f"--{name.replace('_', '-')}" in reason
    assert obstacles.has_elastic_states(runner)
    arguments.max_mamba_cache_size = 60
    assert not obstacles.has_elastic_states(runner)


def test_a_page_of_states_that_are_copied_stays_until_the_copy_has_ended(ours: Hybrid) -> None:
    engine, pages = ours.engine, ours.slots.pages
    slots = ours.take(1 + pages.geometry.blocks_per_page)
    assert [engine.pool_of(name) for name in ("kv", "mamba", "swa")] == [0, 1, None]
    engine.check_copied(slots, 1)
    engine.hold([slots[-1:]], 7, 1)
    held = int(slots[-1]) // pages.geometry.ids_per_page
    ours.allocator.free(slots)
    engine.giving.give(WantedPages(NUM_PAGES, 0))
    assert [*pages.open_pages] == [0, held]  # page 0 has the padding state
    engine.release(7)
    assert engine.giving.close(NUM_PAGES) == 1
    assert [*pages.open_pages] == [0]
