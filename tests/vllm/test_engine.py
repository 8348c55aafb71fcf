"""The engine core's side: one geometry for ranks of different depth, and what it says to them."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvcached_core import instance
from kvcached_core.arena import Arena
from kvcached_core.config import HOST, Config, read_config
from kvcached_core.devices import Device
from kvcached_core.errors import ConfigError
from kvcached_core.ledger import Ledger
from kvcached_core.units import MIB
from kvcached_core.vmm.host import HostBackend
from kvcached_vllm import engine as engine_module
from kvcached_vllm.engine import ElasticEngine
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
        self.calls: list[tuple[str, Any]] = []
        self.model_executor = self
        self.is_busy = False
        self.scheduler = SimpleNamespace(has_unfinished_requests=lambda: self.is_busy)
        self.input_queue = SimpleNamespace(put_nowait=lambda _item: None)
        self._idle_state_callbacks: list[Any] = []

    def collective_rpc(self, function: Any, args: tuple[Any, ...] = ()) -> list[Any]:
        self.calls.append((function.__name__, *args))
        return []


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return read_config({"KVCACHED_DIR": str(tmp_path / "kv"), "KVCACHED_IDLE_SECONDS": "1000"})


@pytest.fixture
def engine(config: Config) -> Iterator[ElasticEngine]:
    vllm_config = SimpleNamespace(model_config=SimpleNamespace(model="m", max_model_len=2048))
    made = ElasticEngine(vllm_config, config, [FIRST, SECOND], Core())
    yield made
    made.close()


def place(engine: ElasticEngine) -> list[Any]:
    plans = [plan(6), plan(8)]
    engine.place(plans, 2 * MIB)
    return [getattr(each, PLACEMENT) for each in plans]


def test_pipeline_stages_of_different_depth_share_ids_and_pages(engine: ElasticEngine) -> None:
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


def test_each_rank_reports_to_the_ledger_of_its_own_device(engine: ElasticEngine) -> None:
    placements = place(engine)
    assert [Path(each.seat.ledger_path).stem for each in placements] == ["first", "second"]
    for each in placements:
        with Ledger(Path(each.seat.ledger_path)) as ledger:
            (view,) = ledger.view().instances
            assert view.promised_bytes == each.geometry.page_bytes  # page 0, on both


def test_a_start_without_room_for_a_page_says_what_is_missing(
    engine: ElasticEngine, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(instance, "PATIENCE_SECONDS", 0.05)
    place(engine)
    engine.reserve(1 << 20, is_urgent=False)
    vllm_config = SimpleNamespace(model_config=SimpleNamespace(model="m", max_model_len=2048))
    late = ElasticEngine(vllm_config, config, [FIRST], Core())
    with pytest.raises(ConfigError, match=r"first page: needed \d+ bytes, available 0"):
        late.place([plan(8)], 2 * MIB)
    late.close()


def build_pool(engine: ElasticEngine) -> Any:
    return engine.build_pool(
        num_gpu_blocks=NUM_BLOCKS,
        enable_caching=False,
        hash_block_size=16,
        enable_kv_cache_events=False,
    )


def test_what_the_pool_decided_goes_to_all_workers(engine: ElasticEngine) -> None:
    place(engine)
    pool = build_pool(engine)
    pool.get_new_blocks(40)
    engine.flush()
    ((name, orders),) = engine.core.calls
    assert name == "apply_orders"
    assert len(orders.map_pages) >= 1


def test_before_sleep_everything_but_page_zero_goes_and_is_waited_for(
    engine: ElasticEngine,
) -> None:
    place(engine)
    pool = build_pool(engine)
    blocks = pool.get_new_blocks(40)
    engine.flush()
    pool.free_blocks(blocks)
    engine.core.calls.clear()
    engine.empty()
    (name, orders), (last,) = engine.core.calls
    assert (name, last) == ("apply_orders", "settle_orders")
    assert pool.pages.num_resident_pages == 1
    assert len(orders.unmap_pages) >= 1


def test_after_the_last_request_pages_linger_and_an_alarm_is_set(engine: ElasticEngine) -> None:
    place(engine)
    pool = build_pool(engine)
    blocks = pool.get_new_blocks(40)
    engine.flush()
    pool.free_blocks(blocks)
    engine.end_burst()
    assert pool.pages.num_resident_pages > 2
    assert engine.instance._bells[0]._deadline is not None
    del engine.core.input_queue  # an engine in the caller's process cannot be woken
    engine.end_burst()
    assert pool.pages.num_resident_pages == 2


@pytest.mark.parametrize("is_busy", [False, True])
def test_an_idle_engine_waits_until_its_first_pages_are_gone_and_a_busy_one_does_not(
    engine: ElasticEngine, monkeypatch: pytest.MonkeyPatch, *, is_busy: bool
) -> None:
    monkeypatch.setattr(engine_module, "FIRST_PAGES", 2)
    place(engine)
    pool = build_pool(engine)
    blocks = pool.get_new_blocks(150)
    engine.flush()
    pool.free_blocks(blocks)
    engine.core.is_busy = is_busy
    page_bytes = engine.instance.page_bytes
    seat = engine.instance.seat(FIRST)
    with Ledger(Path(seat.ledger_path)) as ledger:
        ledger.settle(seat.row, mapped_bytes=5 * page_bytes, used_bytes=0, cached_bytes=0)
        assert ledger.ask(seat.row, 4 * page_bytes) == 4 * page_bytes
        engine.core.calls.clear()
        engine.answer()
        assert ledger.wanted(seat.row).asked_bytes == 0
    unmapped = [len(call[1].unmap_pages) for call in engine.core.calls if len(call) > 1]
    names = [call[0] for call in engine.core.calls]
    assert names == ["apply_orders", *([] if is_busy else ["settle_orders"])]
    assert unmapped == [4]
