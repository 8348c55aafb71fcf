"""A worker's memory: orders, warm-up and the debug check, over a real ledger and host memory."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from helpers.backends import count_calls
from helpers.fake_driver import FakeDriver, Result, tensors_on_the_host
from helpers.waiting import PATIENCE_SECONDS

from kvcached_core.errors import ConfigError, UnmappedBlockError
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.opening import ledger_directory
from kvcached_core.ledger.view import InstanceView
from kvcached_core.memory import rank
from kvcached_core.memory.geometry import choose_geometry
from kvcached_core.memory.orders import PageOrders
from kvcached_core.memory.rank import RankMemory
from kvcached_core.memory.seats import Seat
from kvcached_core.memory.vmm.cuda import CudaBackend
from kvcached_core.memory.vmm.host import HostBackend
from kvcached_core.units import MIB
from kvcached_vllm import worker_hooks
from kvcached_vllm.layout import PLACEMENT
from kvcached_vllm.worker import block_ids, carry_out

pytestmark = pytest.mark.vllm

GEOMETRY = choose_geometry(
    block_bytes=65536, num_planes=4, granularity_bytes=2 * MIB, target_page_bytes=4 * MIB
)
PAGE = GEOMETRY.page_bytes


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(ledger_directory(tmp_path / "kv") / "host.ledger", 64 * PAGE) as opened:
        yield opened


@pytest.fixture
def memory(ledger: Ledger) -> Iterator[RankMemory]:
    row = ledger.register(name="a", engine="test")
    ledger.promise(row, PAGE, PAGE)
    memory = RankMemory(GEOMETRY, 16, Seat(str(ledger.path), row, 1), HostBackend())
    yield memory
    memory.close()


def seen(ledger: Ledger) -> InstanceView:
    (view,) = ledger.view().instances
    return view


def step(new: list[list[int]], grown: list[list[int] | None] | None = None) -> Any:
    """Return a stand-in for `SchedulerOutput` with one cache group."""
    return SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(block_ids=(ids,)) for ids in new],
        scheduled_cached_reqs=SimpleNamespace(
            new_block_ids=[None if ids is None else (ids,) for ids in grown or []]
        ),
    )


def ids_of(new: list[list[int]], grown: list[list[int] | None] | None = None) -> Any:
    return block_ids(step(new, grown))


def test_page_zero_is_resident_from_the_start(memory: RankMemory, ledger: Ledger) -> None:
    assert memory.arena.resident_pages == [0]
    assert (seen(ledger).resident_bytes, seen(ledger).used_bytes) == (PAGE, PAGE)
    assert seen(ledger).promised_bytes == 0


def test_orders_map_before_and_unmap_after_and_may_come_twice(
    memory: RankMemory, ledger: Ledger
) -> None:
    ledger.promise(seen(ledger).row, 2 * PAGE, PAGE)
    orders = PageOrders(map_pages=[3, 5], num_used_pages=2, num_cached_pages=1)
    for _ in range(2):
        carry_out(SimpleNamespace(kvcached=memory), orders, wait=False)
        view = seen(ledger)
        sizes = (view.resident_bytes, view.used_bytes, view.cached_bytes, view.promised_bytes)
        assert sizes == (3 * PAGE, 2 * PAGE, PAGE, 0)
    orders = PageOrders(unmap_pages=[3], num_used_pages=1, num_cached_pages=1)
    memory.before_step(orders)
    assert memory.arena.is_resident(3)
    memory.after_step(orders)
    memory.after_step(orders)
    memory.keeper.wait()
    assert seen(ledger).resident_bytes == 2 * PAGE


def test_warm_up_on_made_up_ids_is_mapped_and_given_back(
    memory: RankMemory, ledger: Ledger
) -> None:
    ids = list(range(1, GEOMETRY.ids_per_page + 2))
    memory.map_for_warm_up(ids_of([ids], [[3 * GEOMETRY.ids_per_page], None]))
    assert sorted(memory.arena.resident_pages) == [0, 1, 3]
    assert seen(ledger).resident_bytes == 3 * PAGE
    memory.arena.plane_tensor(GEOMETRY.num_planes - 1).view(-1, GEOMETRY.block_bytes)[ids] = 1
    memory.end_warm_up()
    assert memory.arena.resident_pages == [0]
    assert (seen(ledger).resident_bytes, seen(ledger).promised_bytes) == (PAGE, 0)
    assert not memory.is_warming_up


def test_warm_up_waits_for_a_promise_and_maps_nothing_without_one(
    memory: RankMemory, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank, "ROOM_SECONDS", 0.1)
    other = ledger.register(name="b", engine="test")
    held = ledger.promise(other, 64 * PAGE, PAGE)
    touches = [GEOMETRY.ids_per_page]
    with pytest.raises(ConfigError, match=r"needed 1 pages of .* missing .* on host"):
        memory.map_for_warm_up(touches)
    assert memory.arena.resident_pages == [0]

    asked_peers = rank.ask_peers

    def give(*args: Any) -> None:
        asked_peers(*args)
        ledger.cancel(other, PAGE)  # the neighbour hears of it and gives a page

    monkeypatch.setattr(rank, "ask_peers", give)
    memory.map_for_warm_up(touches)
    assert sorted(memory.arena.resident_pages) == [0, 1]
    rows = {view.name: view for view in ledger.view().instances}
    assert sum(view.resident_bytes + view.promised_bytes for view in rows.values()) == 64 * PAGE
    assert rows["b"].promised_bytes == held - PAGE


def test_warm_up_on_an_id_in_a_gap_maps_both_pages_that_it_may_reach(
    memory: RankMemory, ledger: Ledger
) -> None:
    memory.map_for_warm_up(ids_of([[GEOMETRY.blocks_per_page]]))
    assert sorted(memory.arena.resident_pages) == [0, 1]
    assert seen(ledger).resident_bytes == 2 * PAGE


def test_the_check_names_blocks_that_are_not_mapped_or_do_not_exist(memory: RankMemory) -> None:
    memory.check_blocks(ids_of([[1, 2]], [None]))
    with pytest.raises(UnmappedBlockError, match=rf"\[{GEOMETRY.ids_per_page}\] of pages \[1\]"):
        memory.check_blocks(ids_of([[1]], [[GEOMETRY.ids_per_page]]))
    gap = GEOMETRY.blocks_per_page
    with pytest.raises(UnmappedBlockError, match=rf"\[{gap}\] of pages \[0\]"):
        memory.check_blocks(ids_of([[gap]]))


def test_closing_gives_every_byte_back(ledger: Ledger) -> None:
    row = ledger.register(name="a", engine="test")
    ledger.promise(row, 2 * PAGE, PAGE)
    memory = RankMemory(GEOMETRY, 16, Seat(str(ledger.path), row, 1), HostBackend())
    memory.carry_out(PageOrders(map_pages=[4], num_used_pages=2))
    memory.close()
    assert seen(ledger).resident_bytes == 0


def test_a_start_that_fails_behind_its_first_page_gives_it_back(
    ledger: Ledger, memory: RankMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    resident_bytes: list[int] = []

    def fail(_worker: Any, plan: str) -> None:
        assert plan == "sparse plan"
        resident_bytes.append(seen(ledger).resident_bytes)
        raise MemoryError("no host tier")

    monkeypatch.setattr(worker_hooks, "make_memory", lambda *_: memory)
    layout = SimpleNamespace(is_one_allocation=True)
    monkeypatch.setattr(worker_hooks, "plane_layout", lambda _plan: layout)
    monkeypatch.setattr(worker_hooks, "sparse_config", lambda *_: "sparse plan")
    worker = SimpleNamespace(device=torch.device("cpu"))
    plan = SimpleNamespace(**{PLACEMENT: SimpleNamespace(seat=memory.seat)})
    with pytest.raises(MemoryError, match="no host tier"):
        worker_hooks.worker_initialize_from_config(fail)(worker, plan)
    assert resident_bytes == [PAGE]
    assert seen(ledger).resident_bytes == 0


FORK = """
import os, sys
from pathlib import Path
from kvcached_core.memory.geometry import choose_geometry
from kvcached_core.engine.instance import Seat
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.opening import ledger_directory
from kvcached_core.memory.rank import RankMemory
from kvcached_core.memory.vmm.host import HostBackend

geometry = choose_geometry(block_bytes=65536, num_planes=4, granularity_bytes=2 << 20)
path = ledger_directory(Path(sys.argv[1])) / "host.ledger"
ledger = Ledger(path, 1 << 30)
row = ledger.register(name="a", engine="test")
ledger.promise(row, geometry.page_bytes, geometry.page_bytes)
memory = RankMemory(geometry, 4, Seat(str(path), row, 1), HostBackend())
number = os.fork()
if number == 0:
    memory.close()  # what an engine's own clean-up in the child does
    os._exit(0)
assert os.waitpid(number, 0)[1] == 0
(view,) = ledger.view().instances
assert view.resident_bytes == geometry.page_bytes, view
memory.arena.tensor()[:8].fill_(1)
memory.close()
(view,) = ledger.view().instances
assert view.resident_bytes == 0, view
"""


def test_a_forked_child_that_closes_takes_nothing_from_its_parent(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORK, str(tmp_path / "kv")],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    tensors_on_the_host(monkeypatch)
    return FakeDriver(capacity_bytes=8 * PAGE)


@pytest.fixture
def gpu_memory(ledger: Ledger, driver: FakeDriver) -> Iterator[RankMemory]:
    row = ledger.register(name="a", engine="test")
    ledger.promise(row, PAGE, PAGE)
    backend = CudaBackend(api=cast("Any", driver))
    memory = RankMemory(GEOMETRY, 16, Seat(str(ledger.path), row, 1), backend, lambda: 7)
    yield memory
    driver.idle.set()
    memory.close()
    assert driver.created_bytes == 0


def test_on_a_gpu_a_page_goes_when_the_step_behind_it_is_done(
    gpu_memory: RankMemory, driver: FakeDriver, ledger: Ledger
) -> None:
    ledger.promise(seen(ledger).row, 2 * PAGE, PAGE)
    gpu_memory.before_step(PageOrders(map_pages=[1, 2], num_used_pages=3))
    assert driver.calls["cuStreamWaitEvent"] == 2  # page 0, and this step
    driver.idle.clear()
    gpu_memory.after_step(PageOrders(unmap_pages=[1, 2], num_used_pages=1))
    ledger.promise(seen(ledger).row, PAGE, PAGE)
    gpu_memory.before_step(PageOrders(map_pages=[1], num_used_pages=2))
    assert driver.mapped_bytes == 3 * PAGE  # page 1 was needed again, page 2 waits for its fence
    driver.idle.set()
    gpu_memory.keeper.wait()
    assert sorted(gpu_memory.arena.resident_pages) == [0, 1]
    assert (seen(ledger).resident_bytes, seen(ledger).promised_bytes) == (2 * PAGE, 0)


def test_on_a_gpu_spare_pages_cost_the_engines_thread_no_driver_call(
    gpu_memory: RankMemory, ledger: Ledger
) -> None:
    ledger.promise(seen(ledger).row, 4 * PAGE, PAGE)
    counting = count_calls(gpu_memory)
    orders = PageOrders(spare_pages=[1, 2, 3, 4], num_used_pages=1)
    gpu_memory.before_step(orders)
    assert gpu_memory.arena.resident_pages == [0]  # not beside the launches of this step
    gpu_memory.after_step(orders)
    gpu_memory.keeper.wait()
    gpu_memory.before_step(PageOrders(ready_pages=[1, 2], num_used_pages=3))
    assert counting.num_calls_of_thread(threading.get_ident()) == 0
    assert seen(ledger).resident_bytes == 5 * PAGE


def test_a_step_waits_for_memory_that_somebody_outside_took(
    gpu_memory: RankMemory, driver: FakeDriver, ledger: Ledger
) -> None:
    ledger.promise(seen(ledger).row, PAGE, PAGE)
    first = driver.calls["cuMemCreate"]
    driver.fails = lambda name, number: (
        Result.CUDA_ERROR_OUT_OF_MEMORY if name == "cuMemCreate" and number < first + 3 else None
    )
    gpu_memory.before_step(PageOrders(map_pages=[5], num_used_pages=2))
    assert gpu_memory.arena.is_resident(5)
    assert driver.calls["cuMemCreate"] == first + 4
