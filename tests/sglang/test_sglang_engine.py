"""A schedule of our engine: what is mapped before its batch, and what waits for the launches."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from helpers.sglang_elastic import NoCache, hooked, let_schedule, make_allocator, make_engine

from kvcached_core.memory.orders import PageOrders
from kvcached_core.units import MIB
from kvcached_sglang import hooks
from kvcached_sglang.engine import SglangEngine, data_rank_of

pytestmark = pytest.mark.sglang

PAGE_TOKENS = 64
NUM_PAGES = 16


class Memory:
    """A rank's memory that notes what it is told, and when."""

    def __init__(self) -> None:
        self.mapped: list[list[int]] = []
        self.later: list[tuple[list[int], list[int]]] = []
        self.keeper = SimpleNamespace(wait=lambda _seconds=None: None)

    def before_step(self, orders: PageOrders) -> None:
        self.mapped.append(orders.map_pages + orders.ready_pages)

    def after_step(self, orders: PageOrders) -> None:
        self.later.append((orders.spare_pages, orders.unmap_pages))


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[SglangEngine]:
    """Return an engine that keeps one spare page, and has no requests."""
    made = make_engine(tmp_path, host_pool=NUM_PAGES * 2 * MIB, page_bytes=2 * MIB, idle_seconds=0)
    pool = make_allocator(made, NUM_PAGES * PAGE_TOKENS - 1).get_kvcache()
    let_schedule(made, NoCache())
    memory, made.port.memory = made.port.memory, Memory()  # type: ignore[assignment]
    yield made
    pool.k_buffer.clear()
    pool.v_buffer.clear()
    assert memory is not None
    memory.close()
    made.close()


def allocator_of(engine: SglangEngine) -> Any:
    return engine.free_lists[0]._allocator


def test_what_a_batch_needs_is_mapped_before_it_and_the_rest_behind_its_launches(
    engine: SglangEngine,
) -> None:
    memory: Any = engine.port.memory
    engine.before_schedule()
    allocator_of(engine).alloc(3 * PAGE_TOKENS - 1)
    assert memory.mapped == []  # all of a schedule's are mapped together
    engine.after_schedule(has_batch=True)
    assert memory.mapped == [[1, 2]]
    assert memory.later == []
    engine.before_schedule()
    assert memory.later == [([3], [])]


def test_what_is_owed_is_told_before_the_schedule_can_take_it(engine: SglangEngine) -> None:
    memory: Any = engine.port.memory
    engine.before_schedule()
    allocator = allocator_of(engine)
    ids = allocator.alloc(3 * PAGE_TOKENS - 1)
    engine.after_schedule(has_batch=True)
    allocator.free(ids)
    engine.giving.owed_pages = 2
    assert allocator.available_size() == 0
    engine.before_schedule()
    assert sorted(memory.later[-1][1]) == [2, 3]  # the spare page, and the highest
    assert engine.giving.owed_pages == 0
    assert allocator.available_size() > 0


def test_a_turn_without_a_batch_leaves_nothing_for_later(engine: SglangEngine) -> None:
    memory: Any = engine.port.memory
    engine.before_schedule()
    allocator = allocator_of(engine)
    ids = allocator.alloc(5 * PAGE_TOKENS)
    engine.after_schedule(has_batch=True)
    allocator.free(ids)
    engine.before_schedule()
    engine.after_schedule(has_batch=False)
    assert len(memory.later[-1][1]) == 5  # of six, the spare one included, one stays


def test_what_is_opened_after_a_schedule_is_mapped_before_the_batch(engine: SglangEngine) -> None:
    memory: Any = engine.port.memory
    engine.before_schedule()
    engine.after_schedule(has_batch=True)
    memory.mapped.clear()
    seen: list[list[list[int]]] = []
    run = hooks.run_batch(lambda _self, _batch: seen.append([*memory.mapped]))
    with hooked(engine):
        run(engine.port.scheduler, None)
        allocator_of(engine).alloc(3 * PAGE_TOKENS - 1)
        run(engine.port.scheduler, None)
    assert seen[0] == []
    assert len(seen[1]) == 1


def test_a_turn_that_has_nothing_to_do_counts_no_pages(
    engine: SglangEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[bool] = []
    monkeypatch.setattr(engine, "_count_pages", lambda: (counted.append(True), (1, 0))[1])
    monkeypatch.setattr(engine.ranks, "look", lambda **_: None)  # no time passes
    for _ in range(3):
        engine.before_schedule()
        engine.after_schedule(has_batch=False)
    assert len(counted) == 1


@pytest.mark.parametrize(("rank", "number"), [(None, 0), (0, 0), (1, 1)])
def test_a_data_parallel_rank_has_its_number_wherever_a_release_keeps_it(
    rank: int | None, number: int
) -> None:
    kept = SimpleNamespace(dp_rank=rank)
    assert data_rank_of(kept) == number
    assert data_rank_of(SimpleNamespace(ps=kept)) == number
    with patch("sglang.srt.runtime_context.get_parallel", lambda: kept):
        assert data_rank_of(SimpleNamespace()) == number
