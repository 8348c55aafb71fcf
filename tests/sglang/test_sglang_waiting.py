"""Requests that wait for memory are seen in the gauges and in the ledger, and others are not."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.sglang_elastic import make_engine

from kvcached_core.engine.ranks import NUM_IDLE_TURNS, Ranks
from kvcached_core.errors import UnmappedBlockError
from kvcached_core.memory.rank import RankMemory
from kvcached_core.units import MIB
from kvcached_sglang.engine import SglangEngine
from kvcached_sglang.port import GAUGE_SECONDS

pytestmark = pytest.mark.sglang


class Reporter:
    """SGLang's, as far as gauges go."""

    def __init__(self, scheduler: Any) -> None:
        self.metrics_collector = SimpleNamespace(last_log_time=time.perf_counter())
        self.published: list[int] = []
        self._scheduler = scheduler

    def _maybe_log_idle_metrics(self) -> None:
        if time.perf_counter() > self.metrics_collector.last_log_time + 30:
            self.published.append(len(self._scheduler.waiting_queue))


def scheduler(*waiting: str) -> Any:
    running = SimpleNamespace(reqs=[])
    made = SimpleNamespace(waiting_queue=list(waiting), last_batch=None, running_batch=running)
    made.metrics_reporter = Reporter(made)
    return made


@pytest.fixture
def engine(tmp_path: Path) -> Any:
    made = make_engine(tmp_path, host_pool=8 * MIB)
    made.ranks.describe(page_bytes=2 * MIB, num_pages=4, least_pages=1)
    book = SimpleNamespace(take_orders=lambda *_, **__: None)
    geometry = SimpleNamespace(page_bytes=2 * MIB)
    pages: Any = SimpleNamespace(end_schedule=lambda **_: None, book=book, geometry=geometry)
    made.pools.append(pages)
    neighbour = make_engine(tmp_path, host_pool=8 * MIB)
    neighbour.ranks.describe(page_bytes=2 * MIB, num_pages=4, least_pages=1)
    neighbour.ranks.promise(2, is_urgent=True)
    yield made
    made.close()
    neighbour.close()


def end_schedule(engine: SglangEngine, busy: Any, *, has_batch: bool) -> None:
    engine.port.scheduler = busy
    engine.after_schedule(has_batch=has_batch)


def waiting_bytes(engine: SglangEngine) -> int:
    (ledger,) = engine.ranks.instance._ledgers.values()  # type: ignore[union-attr]
    return next(row.waiting_bytes for row in ledger.view().instances if row.name == "m")


def test_who_was_refused_waits_while_its_request_does(engine: SglangEngine) -> None:
    busy = scheduler("one")
    engine.ranks.promise(6, is_urgent=True)
    for _ in range(3):
        end_schedule(engine, busy, has_batch=False)
    assert waiting_bytes(engine) > 0


def test_the_gauges_say_so_once_a_second(
    engine: SglangEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("kvcached_sglang.port.time", SimpleNamespace(monotonic=lambda: now))
    busy = scheduler("one", "two")
    engine.ranks.promise(6, is_urgent=True)
    for _ in range(6):
        end_schedule(engine, busy, has_batch=False)
        now += GAUGE_SECONDS / 2
    assert busy.metrics_reporter.published == [2] * 3


def test_who_is_only_asked_for_waits_too(engine: SglangEngine) -> None:
    busy = scheduler("one")
    engine.ranks.ask(1)
    end_schedule(engine, busy, has_batch=True)
    assert waiting_bytes(engine) == 2 * MIB


def test_who_has_a_batch_leaves_the_gauges_to_sglang(engine: SglangEngine) -> None:
    busy = scheduler("one")
    engine.ranks.promise(6, is_urgent=True)
    end_schedule(engine, busy, has_batch=True)
    assert not busy.metrics_reporter.published


class CountingInstance:
    """An instance that counts how often it is locked."""

    def __init__(self) -> None:
        self.is_new = False
        self.num_locks = 0
        self.beside = SimpleNamespace(wish=lambda: 0)

    def has_news(self) -> bool:
        return self.is_new

    def wanted_pages(self) -> tuple[int, int]:
        self.num_locks += 1
        return 3, 0

    def room_pages(self) -> int:
        self.num_locks += 1
        return 7


def ranks(instance: Any, *, shared: list[int] | None = None, **more: int) -> Ranks:
    def share(values: list[int]) -> list[int]:
        if shared is not None:
            shared.append(1)
        return values

    seat = SimpleNamespace(num_ranks=1)
    options = more | ({"share": share} if shared is not None else {})
    return Ranks(instance, seat, 0, **options)  # type: ignore[arg-type]


def test_an_idle_scheduler_takes_no_lock_until_somebody_wants_something() -> None:
    instance = CountingInstance()
    idle = ranks(instance)
    for _ in range(100):
        assert idle.look(is_busy=False) is None
    assert instance.num_locks == 0
    instance.is_new = True
    wanted = idle.look(is_busy=False)
    assert wanted is not None
    assert wanted.asked_pages == 3


def test_a_busy_scheduler_looks_again_when_what_it_saw_is_old(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 5.0
    monkeypatch.setattr("kvcached_core.engine.ranks.time", SimpleNamespace(monotonic=lambda: now))
    instance = CountingInstance()
    busy = ranks(instance)
    for _ in range(10):
        busy.look(is_busy=True)
    assert instance.num_locks == 1
    assert busy.room_pages == 7
    now += 0.002
    busy.look(is_busy=True)
    assert instance.num_locks == 2


def test_idle_ranks_tell_each_other_what_is_new_once_in_some_turns() -> None:
    told: list[int] = []
    many = ranks(CountingInstance(), shared=told)
    for _ in range(3 * NUM_IDLE_TURNS):
        many.look(is_busy=False)
    assert len(told) == 3
    many.look(is_busy=True)
    assert len(told) == 4


def test_idle_ranks_whose_loop_sleeps_a_second_look_in_every_turn() -> None:
    told: list[int] = []
    many = ranks(CountingInstance(), shared=told, num_idle_turns=1)
    for _ in range(3):
        many.look(is_busy=False)
    assert len(told) == 3


def test_ranks_on_one_device_share_its_virtual_size(engine: SglangEngine) -> None:
    whole = engine.virtual_bytes
    engine.ranks.seat = SimpleNamespace(num_ranks=2)  # type: ignore[assignment]
    assert engine.virtual_bytes == whole // 2


def test_a_batch_that_names_a_block_which_is_not_mapped_is_refused() -> None:
    engine: Any = SglangEngine.__new__(SglangEngine)
    geometry: Any = SimpleNamespace(
        exists=lambda block: block < 8, page_of=lambda block: block // 4
    )
    memory = RankMemory.__new__(RankMemory)
    memory.arena = memory._all = SimpleNamespace(is_resident=lambda page: page == 0)  # type: ignore[assignment]
    engine.pools = [SimpleNamespace(geometry=geometry, book=SimpleNamespace(first_page=0))]
    engine.port, engine.states = SimpleNamespace(memory=memory, block_tokens=2), None
    table = torch.tensor([[0, 0, 0], [2, 3, 4]])
    scheduler = SimpleNamespace(req_to_token_pool=SimpleNamespace(req_to_token=table))

    def batch(*new: int, length: int) -> Any:
        return SimpleNamespace(
            seq_lens=torch.tensor([length]),
            req_pool_indices=torch.tensor([1]),
            out_cache_loc=torch.tensor(new),
        )

    engine.check(scheduler, batch(5, length=3))
    for wrong in (batch(8, length=3), batch(16, length=3)):
        with pytest.raises(UnmappedBlockError, match=r"unmapped blocks \[[48]\] of pages \[[12]\]"):
            engine.check(scheduler, wrong)
