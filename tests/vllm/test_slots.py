"""What a request needs is promised before vLLM looks whether it is there."""

from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from helpers.configurations import configuration
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core import kv_cache_coordinator
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
)
from vllm.v1.request import Request, RequestStatus

from kvcached_core.config import HOST, read_config
from kvcached_core.engine.ranks import WantedPages
from kvcached_core.memory.devices import Device
from kvcached_core.units import MIB
from kvcached_vllm import engine_hooks
from kvcached_vllm.engine import VllmEngine

pytestmark = [pytest.mark.vllm, pytest.mark.older_release]

BLOCK_SIZE = 16
BLOCK_BYTES = 65536
NUM_BLOCKS = 256
NUM_PLANES = 8
SIZES: dict[str, Any] = {
    "block_size": BLOCK_SIZE,
    "num_kv_heads": 1,
    "head_size": 8,
    "dtype": torch.float32,
}
DEVICE = Device(HOST, "host", 256 * MIB)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[VllmEngine]:
    config = read_config({"KVCACHED_DIR": str(tmp_path / "kv"), "KVCACHED_MIN_SPARE_PAGES": "0"})
    vllm_config = configuration(model_config=SimpleNamespace(model="m", max_model_len=2048))
    core = SimpleNamespace(
        scheduler=SimpleNamespace(
            get_request_counts=lambda: (1, 0),
            has_unfinished_requests=lambda: True,
            kv_cache_manager=SimpleNamespace(take_events=list),
        ),
        model_executor=SimpleNamespace(collective_rpc=lambda *_call, **_options: []),
    )
    made = VllmEngine(vllm_config, config, [DEVICE], core)
    tensors = [SimpleNamespace(size=BLOCK_BYTES * NUM_BLOCKS) for _ in range(NUM_PLANES)]
    plan = SimpleNamespace(kv_cache_tensors=tensors, num_blocks=NUM_BLOCKS, kv_cache_groups=[])
    made.place([plan], 2 * MIB)
    yield made
    made.close()


@pytest.fixture
def manager(engine: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> Any:
    return manager_of(FullAttentionSpec(**SIZES), engine, monkeypatch)


def manager_of(spec: Any, engine: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return vLLM's own manager over our block pool, hooked as an engine hooks it."""
    for owner, name, hook in (
        (SlidingWindowManager, "get_num_skipped_tokens", engine_hooks.get_num_skipped_tokens),
        (KVCacheManager, "__init__", engine_hooks.kv_cache_manager_init),
        (KVCacheManager, "allocate_slots", engine_hooks.kv_cache_manager_allocate_slots),
        (kv_cache_coordinator, "BlockPool", engine_hooks.block_pool_factory),
    ):
        monkeypatch.setattr(owner, name, hook(getattr(owner, name)))
    init_none_hash(sha256)
    sizes = {
        "max_model_len": NUM_BLOCKS * BLOCK_SIZE,
        "max_num_batched_tokens": NUM_BLOCKS * BLOCK_SIZE,
        "max_in_flight_tokens": NUM_BLOCKS * BLOCK_SIZE,
        "scheduler_block_size": BLOCK_SIZE,
        "hash_block_size": BLOCK_SIZE,
        "enable_caching": True,
    }
    plan = KVCacheConfig(NUM_BLOCKS, [], [KVCacheGroupSpec(["layer"], spec)])
    plan.kvcached = engine
    return KVCacheManager(
        plan,
        **{
            name: sizes[name]
            for name in signature(KVCacheManager.__init__).parameters & sizes.keys()
        },
    )


def request(num_blocks: int, name: str = "r") -> Request:
    tokens = list(range(num_blocks * BLOCK_SIZE))
    hasher = get_request_block_hasher(BLOCK_SIZE, sha256)
    return Request(name, tokens, SamplingParams(max_tokens=1), None, block_hasher=hasher)


def wishes_of(engine: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Return the list of what is asked of the ledger from now on: how many pages, and urgently?"""
    wishes: list[tuple[int, bool]] = []
    promise = engine.instance.promise

    def note(num_pages: int, *, is_urgent: bool, num_spare: int = 0) -> int:
        wishes.append((num_pages, is_urgent))
        return promise(num_pages, is_urgent=is_urgent, num_spare=num_spare)

    monkeypatch.setattr(engine.instance, "promise", note)
    return wishes


def test_what_a_request_needs_is_asked_for_once_and_before_it_gets_it(
    engine: VllmEngine, manager: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    per_page = engine.pools[0].geometry.blocks_per_page
    wishes = wishes_of(engine, monkeypatch)
    one = request(3 * per_page)
    blocks = manager.allocate_slots(one, one.num_tokens)
    assert len(blocks.blocks[0]) == 3 * per_page
    assert wishes == [(3, True)]
    assert engine.pools[0].num_open_pages == 4
    assert (orders := engine.end_schedule()) is not None
    assert len(orders.map_pages) == 3
    manager.free(one)


def test_a_request_that_finds_no_memory_waits(
    engine: VllmEngine, manager: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.ranks.promise(1 << 20, is_urgent=False)
    wishes = wishes_of(engine, monkeypatch)
    one = request(2 * engine.pools[0].geometry.blocks_per_page)
    assert manager.allocate_slots(one, one.num_tokens) is None
    assert wishes == [(2, True)]
    assert engine.ranks.is_waiting


@pytest.mark.parametrize(("kept", "num_pages"), [(0, 1), (1, 2)])
def test_what_vllm_keeps_free_for_others_is_promised_as_well(
    engine: VllmEngine, manager: Any, monkeypatch: pytest.MonkeyPatch, kept: int, num_pages: int
) -> None:
    per_page = engine.pools[0].geometry.blocks_per_page
    wishes = wishes_of(engine, monkeypatch)
    one = request(2 * per_page - 1)  # page 0 has all but one of its blocks
    assert manager.allocate_slots(one, one.num_tokens, reserved_blocks=kept) is not None
    assert wishes == [(num_pages, True)]


@pytest.mark.parametrize(
    ("status", "options", "num_pages"),
    [
        (RequestStatus.WAITING, {}, 2),
        (RequestStatus.PREEMPTED, {}, 2),
        (RequestStatus.RUNNING, {}, 1),
        (RequestStatus.WAITING, {"has_scheduled_reqs": False}, 1),
    ],
)
def test_vllms_watermark_is_kept_for_requests_that_wait_alone(  # noqa: PLR0917  fixtures
    engine: VllmEngine,
    manager: Any,
    monkeypatch: pytest.MonkeyPatch,
    status: Any,
    options: dict[str, Any],
    num_pages: int,
) -> None:
    per_page = engine.pools[0].geometry.blocks_per_page
    manager.watermark_blocks = 1
    wishes = wishes_of(engine, monkeypatch)
    one = request(2 * per_page - 1)
    one.status = status
    assert manager.allocate_slots(one, one.num_tokens, **options) is not None
    assert wishes == [(num_pages, True)]


def test_what_vllm_counts_outside_an_allocation_is_not_promised(
    engine: VllmEngine, manager: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = manager.coordinator.get_num_blocks_to_allocate
    one = request(1)
    with pytest.raises(ValueError, match="num_new_tokens"):
        manager.allocate_slots(one, 0)
    assert manager.coordinator.get_num_blocks_to_allocate == count
    wishes = wishes_of(engine, monkeypatch)
    assert manager.allocate_slots(one, one.num_tokens) is not None
    assert manager.coordinator.get_num_blocks_to_allocate == count
    assert wishes == []


def test_a_running_request_is_promised_blocks_when_few_are_free(
    engine: VllmEngine, manager: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (pages,) = engine.pools
    one = request(2 * pages.geometry.blocks_per_page - 1)  # all of pages 0 and 1
    one.status = RequestStatus.RUNNING
    assert manager.allocate_slots(one, one.num_tokens) is not None
    pages.cancel()
    one.num_computed_tokens = one.num_tokens
    one.append_output_token_ids(7)
    wishes = wishes_of(engine, monkeypatch)
    assert manager.allocate_slots(one, 1) is not None
    assert wishes == [(1, True)]
    one.num_computed_tokens += 1
    one.append_output_token_ids(7)
    assert manager.allocate_slots(one, 1) is not None  # the same block
    assert wishes == [(1, True)]


def test_a_request_that_goes_on_and_needs_more_than_its_new_tokens_is_promised_it(
    engine: VllmEngine, manager: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session's next part waits again: all of it has to fit, and a watermark stays free."""
    wishes = wishes_of(engine, monkeypatch)
    one = request(1)
    assert manager.allocate_slots(one, one.num_tokens) is not None
    one.num_computed_tokens = one.num_tokens
    one.append_output_token_ids(7)
    manager.watermark_blocks = NUM_BLOCKS // 2
    assert manager.allocate_slots(one, 1) is not None
    assert [is_urgent for _, is_urgent in wishes] == [True]


def test_a_request_that_vllm_puts_off_to_the_next_step_takes_no_neighbours_memory(
    engine: VllmEngine, manager: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mamba layers name more blocks than there are where another request's block is not ready."""
    wishes = wishes_of(engine, monkeypatch)
    (of_mamba,) = manager.coordinator.single_type_managers
    not_now = manager.block_pool.num_gpu_blocks + 1
    monkeypatch.setattr(of_mamba, "get_num_blocks_to_allocate", lambda *_, **__: not_now)
    one = request(1)
    assert manager.allocate_slots(one, one.num_tokens) is None
    assert wishes == []
    assert not engine.ranks.is_waiting


def test_nobody_gets_slots_while_pages_are_owed(engine: VllmEngine, manager: Any) -> None:
    one, two = request(engine.pools[0].geometry.blocks_per_page * 2), request(1)
    two.request_id = "two"
    assert manager.allocate_slots(one, one.num_tokens) is not None
    engine.giving.owed_pages = 2
    assert manager.allocate_slots(two, two.num_tokens) is None
    manager.free(one)  # vLLM preempts it
    assert manager.allocate_slots(two, two.num_tokens) is None  # it may have been found on these
    assert manager.allocate_slots(two, two.num_tokens) is not None
    assert engine.giving.owed_pages == 0


def test_a_new_request_waits_for_a_neighbour_and_one_that_runs_does_not(
    engine: VllmEngine, manager: Any
) -> None:
    one, two = request(engine.pools[0].geometry.blocks_per_page * 2), request(1)
    two.request_id = "two"
    assert manager.allocate_slots(one, one.num_tokens) is not None
    engine.giving._yielded_pages, engine.giving._yielded_until = 1, engine.ranks.clock() + 1
    assert manager.allocate_slots(two, two.num_tokens) is None
    one.num_computed_tokens = one.num_tokens
    one.append_output_token_ids(7)
    assert manager.allocate_slots(one, 1) is not None
    manager.free(one)
    assert manager.allocate_slots(two, two.num_tokens) is not None


@pytest.mark.parametrize("num_owed", [0, 1])
def test_a_request_does_not_begin_on_cached_blocks_that_went_meanwhile(
    engine: VllmEngine, manager: Any, num_owed: int
) -> None:
    """A prompt is looked for first, and then asks for slots, where a page may be given."""
    num_blocks = 2 * engine.pools[0].geometry.blocks_per_page
    one, two = request(num_blocks), request(num_blocks + 1, "two")
    running = request(1, "running")
    for each in (running, one):
        assert manager.allocate_slots(each, each.num_tokens) is not None
    engine.giving.give(WantedPages(asked_pages=1, owed_pages=num_owed))
    manager.free(one)

    def begin() -> Any:
        found, num_found, *_ = manager.get_computed_blocks(two)
        num_new = two.num_tokens - num_found
        return num_found, manager.allocate_slots(two, num_new, num_found, found)

    num_first, slots = begin()
    assert slots is None
    num_second, slots = begin()
    assert 0 < num_second < num_first
    assert slots is not None


def test_a_request_that_loads_gets_the_blocks_of_its_window_alone(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    window = SlidingWindowSpec(**SIZES, sliding_window=4 * BLOCK_SIZE)
    manager = manager_of(window, engine, monkeypatch)
    one = request(40)
    loaded = one.num_tokens - BLOCK_SIZE
    engine.port.copies = copies = Mock()
    blocks = manager.allocate_slots(one, BLOCK_SIZE, num_external_computed_tokens=loaded)
    assert blocks is not None
    assert manager.block_pool.num_used_blocks == 4 + 1
    assert manager.block_pool.frees_late
    copies.loads.assert_called_once_with(loaded)
