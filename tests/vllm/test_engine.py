"""The engine core's side: one geometry for ranks of different depth, and what it says to them."""

import gc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.configurations import configuration
from helpers.waiting import await_that
from vllm.v1.core.kv_cache_utils import BlockHash, make_block_hash_with_group_id

from kvcached_core.config import HOST, Config, read_config
from kvcached_core.engine import giving, instance
from kvcached_core.errors import ConfigError, PolicyError, UnsupportedEngineError
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.opening import ledger_directory
from kvcached_core.memory.arena import Arena
from kvcached_core.memory.devices import Device
from kvcached_core.memory.rank import RankMemory
from kvcached_core.memory.seats import Placement
from kvcached_core.memory.vmm.host import HostBackend
from kvcached_core.units import MIB
from kvcached_vllm.engine import VllmEngine
from kvcached_vllm.engine_hooks import engine_core_post_step
from kvcached_vllm.layout import PLACEMENT

pytestmark = pytest.mark.vllm

BLOCK_BYTES = 65536
NUM_BLOCKS = 256
FIRST, SECOND = Device(HOST, "first", 256 * MIB), Device(HOST, "second", 256 * MIB)


def plan(num_layers: int) -> Any:
    tensors = [SimpleNamespace(size=BLOCK_BYTES * NUM_BLOCKS) for _ in range(num_layers)]
    return SimpleNamespace(kv_cache_tensors=tensors, num_blocks=NUM_BLOCKS, kv_cache_groups=[])


class Core:
    """An engine core that has workers to call and a queue to be woken through."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.model_executor = self
        self.is_busy = False
        self.published: list[Any] = []
        self.pool: Any = SimpleNamespace(take_events=list)
        self.scheduler = SimpleNamespace(
            get_request_counts=lambda: (int(self.is_busy), 0),
            has_unfinished_requests=lambda: self.is_busy,
            kv_cache_manager=SimpleNamespace(take_events=self.take_events),
            kv_event_publisher=SimpleNamespace(publish=self.published.append),
        )
        self.input_queue = SimpleNamespace(put_nowait=lambda _item: None)
        self._idle_state_callbacks: list[Any] = []

    def take_events(self) -> Any:
        return self.pool.take_events()

    def collective_rpc(self, function: Any, args: tuple[Any, ...] = ()) -> list[Any]:
        self.calls.append((function.__name__, *args))
        return []


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return read_config({"KVCACHED_DIR": str(tmp_path / "kv"), "KVCACHED_IDLE_SECONDS": "1000"})


@pytest.fixture
def engine(config: Config) -> Iterator[VllmEngine]:
    vllm_config = configuration(model_config=SimpleNamespace(model="m", max_model_len=2048))
    made = VllmEngine(vllm_config, config, [FIRST, SECOND], Core())
    yield made
    made.close()


def test_a_start_with_a_host_tier_of_no_size_leaves_the_ledger(config: Config) -> None:
    extra = {"cpu_bytes_to_use": "much"}
    transfer = SimpleNamespace(
        kv_connector="OffloadingConnector", kv_connector_extra_config=extra, engine_id="it"
    )
    vllm_config = configuration(
        model_config=SimpleNamespace(model="m", max_model_len=2048), kv_transfer_config=transfer
    )
    with Ledger(ledger_directory(config.dir) / f"{FIRST.name}.ledger", FIRST.total_bytes) as ledger:
        with pytest.raises(ValueError, match="much"):
            VllmEngine(vllm_config, config, [FIRST], Core())
        assert not ledger.view().instances


def test_an_engine_that_nobody_has_any_more_leaves_the_ledger(config: Config) -> None:
    vllm_config = configuration(model_config=SimpleNamespace(model="m", max_model_len=2048))
    with Ledger(ledger_directory(config.dir) / f"{FIRST.name}.ledger", FIRST.total_bytes) as ledger:
        core = Core()
        core.kvcached = VllmEngine(vllm_config, config, [FIRST], core)
        assert len(ledger.view().instances) == 1
        del core  # as where a start fails behind the cache's placing
        gc.collect()
        await_that(lambda: not ledger.view().instances)


def memory_at(place: Placement) -> RankMemory:
    return RankMemory(place.geometry, place.num_pages, place.seat, HostBackend())


def place(engine: VllmEngine) -> list[Any]:
    plans = [plan(6), plan(8)]
    engine.place(plans, 2 * MIB)
    return [getattr(each, PLACEMENT) for each in plans]


def test_pipeline_stages_of_different_depth_share_ids_and_pages(engine: VllmEngine) -> None:
    shallow, deep = place(engine)
    assert (shallow.geometry.num_planes, deep.geometry.num_planes) == (6, 8)
    assert shallow.geometry.ids_per_page == deep.geometry.ids_per_page
    assert shallow.geometry.blocks_per_page == deep.geometry.blocks_per_page
    assert shallow.num_pages == deep.num_pages
    for placement in (shallow, deep):
        arena = Arena(HostBackend(), placement.geometry, placement.num_pages)
        last = placement.geometry.block_id(
            placement.num_pages * placement.geometry.blocks_per_page - 1
        )
        end = placement.geometry.block_offset(placement.geometry.num_planes - 1, last)
        assert end + BLOCK_BYTES <= arena.num_bytes
        arena.close()


def test_layers_that_cannot_lie_in_pages_are_refused_and_a_draft_is_named(
    engine: VllmEngine,
) -> None:
    plans = [plan(6)]
    for tensor in plans[0].kv_cache_tensors:
        tensor.block_stride = 1
    config = engine.vllm_config
    with pytest.raises(UnsupportedEngineError, match=r"spreads a block .*LBHNC\)$"):
        engine.place(plans, 2 * MIB)
    config.speculative_config = SimpleNamespace(draft_model_config=config.model_config)  # ngrams
    with pytest.raises(UnsupportedEngineError, match=r"LBHNC\)$"):
        engine.place(plans, 2 * MIB)
    config.speculative_config.draft_model_config = SimpleNamespace(model="draft")
    with pytest.raises(UnsupportedEngineError, match=r"an EAGLE or MTP head .* or method ngram"):
        engine.place(plans, 2 * MIB)


def test_a_draft_with_blocks_of_another_size_lies_in_the_pages_of_its_target(
    engine: VllmEngine,
) -> None:
    plans = [plan(6), plan(6)]
    engine.vllm_config.speculative_config = SimpleNamespace(
        draft_model_config=SimpleNamespace(model="draft")
    )
    for one in plans:
        one.kv_cache_tensors[5].size *= 2
    engine.place(plans, 2 * MIB)
    classes = [(each.block_bytes, each.num_planes) for each in engine.geometry.classes]
    assert classes == [(2 * BLOCK_BYTES, 1), (BLOCK_BYTES, 5)]


def test_each_rank_reports_to_the_ledger_of_its_own_device(engine: VllmEngine) -> None:
    placements = place(engine)
    assert [Path(each.seat.ledger_path).stem for each in placements] == ["first", "second"]
    for each in placements:
        with Ledger(Path(each.seat.ledger_path)) as ledger:
            (view,) = ledger.view().instances
            assert view.promised_bytes == each.geometry.page_bytes  # page 0, on both


def test_a_start_without_room_for_a_page_says_what_is_missing(
    engine: VllmEngine, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(instance, "PATIENCE_SECONDS", 0.05)
    place(engine)
    engine.ranks.promise(1 << 20, is_urgent=False)
    vllm_config = configuration(model_config=SimpleNamespace(model="m", max_model_len=2048))
    late = VllmEngine(vllm_config, config, [FIRST], Core())
    with pytest.raises(
        ConfigError, match=r"first page: (.+) of \1 are missing on first; it is held by"
    ):
        late.place([plan(8)], 2 * MIB)
    late.close()


def build_pool(engine: VllmEngine, *, caching: bool = False) -> Any:
    engine.port.core.pool = engine.build_pool(
        num_gpu_blocks=NUM_BLOCKS,
        enable_caching=caching,
        hash_block_size=16,
        enable_kv_cache_events=caching,
    )
    return engine.port.core.pool


def test_a_pool_has_blocks_of_whole_pages_alone(engine: VllmEngine) -> None:
    place(engine)
    assert engine.geometry is not None
    per_page = engine.geometry.blocks_per_page
    num_blocks = 3 * per_page + 5
    by_name = engine.build_pool(
        num_gpu_blocks=num_blocks,
        enable_caching=False,
        hash_block_size=16,
        enable_kv_cache_events=False,
    )
    by_place = engine.build_pool(num_blocks, False, 16, False)  # noqa: FBT003  vLLM's own
    for pool in (by_name, by_place):
        assert pool.num_gpu_blocks == len(list(pool.blocks)) == 3 * per_page


def test_what_the_pool_decided_goes_to_all_workers(engine: VllmEngine) -> None:
    place(engine)
    pool = build_pool(engine)
    engine.port.core.calls.clear()  # it asked for weights that yield
    pool.get_new_blocks(40)
    engine.flush()
    ((name, orders, wait),) = engine.port.core.calls
    assert (name, wait) == ("carry_out", False)
    assert len(orders.map_pages) >= 1


def test_before_sleep_everything_but_page_zero_goes_and_is_waited_for(
    engine: VllmEngine,
) -> None:
    place(engine)
    pool = build_pool(engine)
    blocks = pool.get_new_blocks(40)
    engine.flush()
    pool.free_blocks(blocks)
    engine.port.core.calls.clear()
    engine.empty()
    ((name, orders, wait),) = engine.port.core.calls
    assert (name, wait) == ("carry_out", True)
    assert pool.pages.num_resident_pages == 1
    assert len(orders.unmap_pages) >= 1


def test_after_the_last_request_pages_linger_and_an_alarm_is_set(engine: VllmEngine) -> None:
    place(engine)
    pool = build_pool(engine)
    blocks = pool.get_new_blocks(40)
    engine.flush()
    pool.free_blocks(blocks)
    engine.rest()
    assert pool.pages.num_resident_pages > 2
    assert engine.instance._bells[0]._deadline is not None
    del engine.port.core.input_queue  # an engine in the caller's process cannot be woken
    engine.rest()
    assert pool.pages.num_resident_pages == 2


@pytest.mark.parametrize("is_busy", [False, True])
def test_an_idle_engine_waits_until_its_first_pages_are_gone_and_a_busy_one_does_not(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch, *, is_busy: bool
) -> None:
    monkeypatch.setattr(giving, "FIRST_PAGES", 2)
    place(engine)
    pool = build_pool(engine)
    blocks = pool.get_new_blocks(150)
    engine.flush()
    pool.free_blocks(blocks)
    engine.port.core.is_busy = is_busy
    page_bytes = engine.instance.page_bytes
    seat = engine.instance.seat(FIRST)
    with Ledger(Path(seat.ledger_path)) as ledger:
        ledger.settle(seat.row, mapped_bytes=5 * page_bytes, used_bytes=0, cached_bytes=0)
        assert ledger.ask(seat.row, 4 * page_bytes) == 4 * page_bytes
        engine.port.core.calls.clear()
        engine.between_steps()
        assert ledger.wanted(seat.row).asked_bytes == 0
    unmapped = [len(orders.unmap_pages) for _, orders, _ in engine.port.core.calls]
    waits = [wait for _, _, wait in engine.port.core.calls]
    assert (waits, unmapped) == (([False], [4]) if is_busy else ([True, False], [2, 2]))


def ledger_of(engine: VllmEngine) -> Ledger:
    return Ledger(Path(engine.instance.seat(FIRST).ledger_path))


def live_blocks(engine: VllmEngine, pool: Any, num_blocks: int) -> Any:
    """Return blocks that requests hold, on pages that are reported as resident."""
    blocks = pool.get_new_blocks(num_blocks)
    for device in (FIRST, SECOND):
        seat = engine.instance.seat(device)
        with Ledger(Path(seat.ledger_path)) as ledger:
            num_bytes = pool.pages.num_resident_pages * engine.instance.page_bytes
            ledger.settle(seat.row, mapped_bytes=num_bytes, used_bytes=num_bytes, cached_bytes=0)
    engine.flush()
    return blocks


def set_limit(engine: VllmEngine, limit_bytes: int | None) -> None:
    for device in (FIRST, SECOND):
        seat = engine.instance.seat(device)
        with Ledger(Path(seat.ledger_path)) as ledger:
            ledger.change_policy(seat.row, limit_bytes=limit_bytes)


def ask(engine: VllmEngine, num_pages: int) -> None:
    for device in (FIRST, SECOND):
        seat = engine.instance.seat(device)
        with Ledger(Path(seat.ledger_path)) as ledger:
            ledger.settle(seat.row, used_bytes=0, cached_bytes=0)  # all of it is idle
            ledger.ask(seat.row, num_pages * engine.instance.page_bytes)


def coming_pages(engine: VllmEngine) -> int:
    with ledger_of(engine) as ledger:
        (view,) = ledger.view().instances
        return view.coming_bytes // engine.instance.page_bytes


def test_what_is_coming_is_announced_before_the_workers_unmap_it(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    place(engine)
    pool = build_pool(engine)
    pool.pages.min_spare_pages = pool.pages.max_spare_pages = 0
    blocks = live_blocks(engine, pool, 150)
    pool.free_blocks(blocks)
    engine.port.core.is_busy = True
    ask(engine, 4)
    announced: list[tuple[int, int]] = []

    def unmap(_function: Any, args: tuple[Any, ...] = ()) -> list[Any]:
        orders, _ = args
        announced.append((coming_pages(engine), len(orders.unmap_pages)))
        for device in (FIRST, SECOND):
            seat = engine.instance.seat(device)
            num_bytes = len(orders.unmap_pages) * engine.instance.page_bytes
            with Ledger(Path(seat.ledger_path)) as ledger:
                ledger.settle(seat.row, unmapped_bytes=num_bytes, used_bytes=0, cached_bytes=0)
        return []

    monkeypatch.setattr(engine.port.core, "collective_rpc", unmap)
    engine.between_steps()
    assert announced == [(4, 4)]
    assert coming_pages(engine) == 0


def test_the_least_limit_holds_the_largest_request_and_the_null_block(
    engine: VllmEngine,
) -> None:
    plans = [plan(6), plan(8)]
    per_page = 16 * MIB // BLOCK_BYTES // 8
    num_pages = 3
    spec = SimpleNamespace(
        max_memory_usage_bytes=lambda _config: num_pages * per_page * BLOCK_BYTES,
        page_size_bytes=BLOCK_BYTES,
        block_size=16,
    )
    for each in plans:
        each.kv_cache_groups = [SimpleNamespace(kv_cache_spec=spec)]
    engine.place(plans, 2 * MIB)
    assert engine.geometry is not None
    assert engine.geometry.blocks_per_page == per_page
    with pytest.raises(PolicyError):
        set_limit(engine, num_pages * engine.instance.page_bytes)
    set_limit(engine, (num_pages + 1) * engine.instance.page_bytes)


@pytest.fixture
def neighbour(engine: VllmEngine, config: Config) -> Iterator[VllmEngine]:
    """Return another engine that was promised all there is beside the first one's page."""
    place(engine)
    build_pool(engine)
    vllm_config = configuration(model_config=SimpleNamespace(model="n", max_model_len=2048))
    made = VllmEngine(vllm_config, config, [FIRST], Core())
    made.place([plan(8)], 2 * MIB)
    made.ranks.promise(1 << 20, is_urgent=False)
    yield made
    made.close()


def waiting_bytes(engine: VllmEngine) -> int:
    with ledger_of(engine) as ledger:
        return next(view.waiting_bytes for view in ledger.view().instances if view.name == "m")


@pytest.mark.usefixtures("neighbour")
def test_an_engine_in_which_nothing_runs_does_not_wait_for_memory(engine: VllmEngine) -> None:
    engine.ranks.promise(5, is_urgent=True)
    assert waiting_bytes(engine) > 0
    engine.rest()
    assert waiting_bytes(engine) == 0


@pytest.mark.usefixtures("neighbour")
def test_an_engine_stops_to_wait_when_who_was_refused_is_gone_and_others_run(
    engine: VllmEngine,
) -> None:
    engine.port.core.is_busy = True

    def end_schedule(engine: VllmEngine, num_waiting: int) -> None:
        engine.port.core.scheduler.get_request_counts = lambda: (1, num_waiting)
        engine.end_schedule()

    engine.ranks.promise(5, is_urgent=True)
    end_schedule(engine, 0)  # refused in this very schedule: preempted, say
    assert waiting_bytes(engine) > 0
    end_schedule(engine, 1)
    assert waiting_bytes(engine) > 0
    end_schedule(engine, 0)
    assert waiting_bytes(engine) == 0
    assert not engine.ranks.is_waiting


def test_rings_in_a_busy_engine_leave_one_wake_behind(engine: VllmEngine) -> None:
    place(engine)
    build_pool(engine)
    engine.port.core.is_busy = True
    for _ in range(5):
        engine.ring()
    (callback,) = engine.port.core._idle_state_callbacks
    callback(engine.port.core)
    engine.ring()
    assert (
        len(engine.port.core._idle_state_callbacks) == 2
    )  # the first one is the engine's to remove


@pytest.mark.parametrize("why", ["asked", "owed", "asleep"])
def test_what_leaves_the_cache_of_an_idle_engine_is_published_when_it_leaves(
    engine: VllmEngine, why: str
) -> None:
    place(engine)
    pool = build_pool(engine, caching=True)
    blocks = live_blocks(engine, pool, 40)
    for number, block in enumerate(blocks):
        key = make_block_hash_with_group_id(BlockHash(b"%032d" % number), 0)
        block._block_hash = key
        pool.cached_block_hash_to_block.insert(key, block)
    pool.free_blocks(blocks)
    engine.port.publish()
    assert engine.port.core.published == []  # nothing left the cache yet
    if why == "asked":
        row = engine.instance.seat(FIRST).row
        with ledger_of(engine) as ledger:
            ledger.settle(row, used_bytes=0, cached_bytes=0)
            ledger.ask(row, 2 * engine.instance.page_bytes)
        engine.between_steps()
    elif why == "owed":
        engine.giving.owed_pages = 2
        engine.rest()
    else:
        engine.empty()
    (batch,) = engine.port.core.published
    assert {type(event).__name__ for event in batch.events} == {"BlockRemoved"}
    assert len(batch.events) >= 2
    engine.port.publish()
    assert len(engine.port.core.published) == 1


def test_four_ranks_on_one_device_share_a_row_and_each_maps_every_page(config: Config) -> None:
    vllm_config = configuration(model_config=SimpleNamespace(model="m", max_model_len=2048))
    engine = VllmEngine(vllm_config, config, [FIRST] * 4, Core())
    plans = [plan(8) for _ in range(4)]
    engine.place(plans, 2 * MIB)
    pool = build_pool(engine)
    ranks = [memory_at(getattr(each, PLACEMENT)) for each in plans]
    page_bytes = engine.instance.page_bytes
    with ledger_of(engine) as ledger:
        (view,) = ledger.view().instances
        assert (view.resident_bytes, view.promised_bytes) == (4 * page_bytes, 0)
        pool.get_new_blocks(40)
        engine.flush()
        (_, orders, _) = engine.port.core.calls[-1]
        for rank in ranks:
            rank.carry_out(orders)
        (view,) = ledger.view().instances
        num_pages = pool.pages.num_resident_pages
        assert (view.resident_bytes, view.promised_bytes) == (4 * num_pages * page_bytes, 0)
        for rank in ranks:
            rank.close()
        (view,) = ledger.view().instances
        assert view.resident_bytes == 0
    engine.close()


@pytest.mark.parametrize(("counts", "rests"), [((1, 0), False), ((0, 1), True)])
def test_an_engine_does_not_rest_while_a_pause_keeps_what_it_computed(
    engine: VllmEngine,
    monkeypatch: pytest.MonkeyPatch,
    counts: tuple[int, int],
    *,
    rests: bool,
) -> None:
    rested: list[bool] = []
    monkeypatch.setattr(engine, "rest", lambda: rested.append(True))
    core = engine.port.core
    core.kvcached = engine
    core.scheduler.get_request_counts = lambda: counts  # vLLM says that nothing is unfinished
    engine_core_post_step(lambda *_: None)(core)
    assert bool(rested) is rests
