"""Waking: what it takes is known, asked for and refused before vLLM allocates anything."""

from collections.abc import Iterator
from pathlib import Path
from signal import SIGSEGV
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.engines import Offline, finish, ours, report_of
from vllm.device_allocator import AllocationData
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor.abstract import Executor

from kvcached_core.config import HOST, Config, read_config
from kvcached_core.engine import ranks
from kvcached_core.engine.engine import ElasticEngine
from kvcached_core.engine.instance import Instance
from kvcached_core.engine.ranks import Ranks as ElasticRanks
from kvcached_core.errors import NoRoomError
from kvcached_core.memory.devices import Device
from kvcached_core.units import MIB
from kvcached_vllm.engine_hooks import executor_wake_up
from kvcached_vllm.sleeping import asleep_bytes, bytes_to_wake
from kvcached_vllm.worker_hooks import worker_wake_up

pytestmark = pytest.mark.vllm

FIRST, SECOND = Device(HOST, "first", 256 * MIB), Device(HOST, "second", 256 * MIB)
HAS_STATE = hasattr(AllocationData((0, 1, 1, 0), "weights"), "is_asleep")


def allocation(num_bytes: int, tag: str, *, is_asleep: bool = True) -> Any:
    data = AllocationData((0, num_bytes, 1 << 40, 7), tag)
    if HAS_STATE:
        data.is_asleep = is_asleep
    return data


@pytest.mark.parametrize(
    ("tags", "deferrable", "expected"),
    [
        (None, (), 111),
        ([], (), 111),
        (["weights"], (), 1),
        (["kv_cache"], (), 10),
        (["weights", "kv_cache"], (), 11),
        # From 0.31 on everything but weights and KV cache comes back with whatever is woken.
        (["weights"], ("weights", "kv_cache"), 101),
        (None, ("weights", "kv_cache"), 111),
    ],
)
def test_a_wake_takes_what_its_tags_hold_in_vllms_table(
    tags: list[str] | None, deferrable: tuple[str, ...], expected: int
) -> None:
    table = [allocation(1, "weights"), allocation(10, "kv_cache"), allocation(100, "cudagraph")]
    if HAS_STATE:
        table.append(allocation(1000, "weights", is_asleep=False))  # woken by an earlier call
    assert bytes_to_wake(table, tags, deferrable) == expected


class Ranks(Executor):
    """vLLM's executor with nothing behind it; what it calls is set on each."""


Ranks.__abstractmethods__ = frozenset()


class Sleepers:
    """A real `EngineCore` and `Executor` as far as they sleep, over two workers' tables."""

    def __init__(self, instance: Instance, tables: list[list[Any]]) -> None:
        self.allocated: list[Any] = []
        self.resumed: list[bool] = []
        self.tables = tables
        executor: Any = object.__new__(Ranks)
        executor.sleeping_tags = {"weights", "kv_cache"}
        executor.collective_rpc = self.call
        if "is_sleeping" not in vars(Executor):  # a property, in newer releases
            executor.is_sleeping = True
        seen = ElasticRanks(instance, instance.seat(FIRST), instance.capacity_bytes)
        executor.kvcached = ElasticEngine(seen, port=SimpleNamespace())  # type: ignore[arg-type]
        self.executor = executor
        self.core: Any = object.__new__(EngineCore)
        self.core.model_executor = executor
        self.core.resume_scheduler = lambda: self.resumed.append(True)

    def call(self, function: Any, *, args: Any = (), kwargs: Any = None) -> list[int]:
        if callable(function):
            return [bytes_to_wake(table, *args) for table in self.tables]
        self.allocated.append((function, kwargs))
        return []


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return read_config({"KVCACHED_DIR": str(tmp_path / "kv")})


def join(config: Config, name: str, devices: list[Device]) -> Instance:
    made = Instance(
        devices, config, name=name, default_name=name, engine="vllm", on_ring=lambda: None
    )
    made.describe(page_bytes=16 * MIB, num_pages=16)
    return made


@pytest.fixture
def sleeper(config: Config, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sleepers]:
    monkeypatch.setattr(ranks, "PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(Executor, "wake_up", executor_wake_up(Executor.wake_up))
    instance = join(config, "sleeper", [FIRST, SECOND])
    tables = [
        [allocation(100 * MIB, "weights"), allocation(20 * MIB, "kv_cache")],
        [allocation(120 * MIB, "weights"), allocation(20 * MIB, "kv_cache")],
    ]
    made = Sleepers(instance, tables)
    engine = made.executor.kvcached
    yield made
    engine.close()


@pytest.fixture
def neighbour(config: Config) -> Iterator[Instance]:
    """Return an engine that holds all but 48 MiB of the second device."""
    instance = join(config, "neighbour", [SECOND])
    assert instance.promise(13, is_urgent=False) == 13
    yield instance
    instance.close()


def announced(instance: Instance) -> set[int]:
    return {
        row.static_bytes for ledger in instance._ledgers.values() for row in ledger.view().instances
    }


def test_a_wake_announces_while_it_allocates_and_not_longer(
    sleeper: Sleepers, config: Config
) -> None:
    instance = sleeper.executor.kvcached.ranks.instance
    seen = []
    call = sleeper.call

    def watch(function: Any, **rest: Any) -> list[int]:
        if not callable(function):
            seen.append(announced(instance))
        return call(function, **rest)

    sleeper.executor.collective_rpc = watch
    sleeper.core.wake_up(None)
    assert seen == [{140 * MIB}]  # of the rank that needs most, on both devices
    assert announced(instance) == {0}
    assert sleeper.resumed == [True]
    assert not sleeper.executor.is_sleeping
    assert config.dir.is_dir()


def test_without_room_a_wake_is_refused_before_it_allocates_and_a_later_one_works(
    sleeper: Sleepers, neighbour: Instance
) -> None:
    with pytest.raises(NoRoomError, match=r"92 MiB of 140 MiB are missing on second.*neighbour"):
        sleeper.core.wake_up(None)
    assert sleeper.allocated == []
    assert sleeper.resumed == []
    assert sleeper.executor.is_sleeping
    assert announced(sleeper.executor.kvcached.ranks.instance) == {0}
    neighbour.cancel(13)
    sleeper.core.wake_up(None)
    assert sleeper.allocated == [("wake_up", {"tags": None})]
    assert sleeper.resumed == [True]


@pytest.mark.usefixtures("neighbour")
def test_what_is_woken_by_tags_needs_room_for_these_alone(sleeper: Sleepers) -> None:
    with pytest.raises(NoRoomError, match="72 MiB of 120 MiB"):
        sleeper.core.wake_up(["weights"])
    sleeper.core.wake_up(["kv_cache"])
    assert sleeper.allocated == [("wake_up", {"tags": ["kv_cache"]})]
    assert sleeper.executor.is_sleeping


def test_an_engine_that_is_awake_or_not_ours_is_left_to_vllm(sleeper: Sleepers) -> None:
    sleeper.core.wake_up(None)
    sleeper.core.wake_up(None)  # vLLM warns
    assert len(sleeper.allocated) == 1
    sleeper.executor.sleeping_tags = {"weights"}
    if "is_sleeping" not in vars(Executor):
        sleeper.executor.is_sleeping = True
    del sleeper.executor.kvcached
    sleeper.core.wake_up(None)
    assert len(sleeper.allocated) == 2


def test_a_worker_without_vllms_allocator_takes_nothing() -> None:
    assert asleep_bytes(None, None) == 0


def test_a_worker_says_what_its_allocators_table_has(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.device_allocator.cumem import CuMemAllocator

    allocator = CuMemAllocator()
    allocator.pointer_to_data = {1: allocation(5, "weights"), 2: allocation(7, "kv_cache")}
    monkeypatch.setattr(CuMemAllocator, "instance", allocator)
    assert asleep_bytes(None, None) == 12
    assert asleep_bytes(None, ["kv_cache"]) == 7


class Memory:
    """A device behind vLLM's real allocator: what it maps, and when it is full."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import torch
        from vllm.device_allocator import cumem

        self.mapped: set[int] = set()
        self.restored: list[int] = []
        self.capacity = 100
        self.allocator = cumem.CuMemAllocator()
        monkeypatch.setattr(cumem.CuMemAllocator, "instance", self.allocator)
        monkeypatch.setattr(cumem, "create_and_map", self.map)
        monkeypatch.setattr(cumem, "unmap_and_release", self.unmap)
        copies = SimpleNamespace(cudaMemcpy=lambda to, *_: self.restored.append(to))
        monkeypatch.setattr(cumem, "libcudart", copies)
        if hasattr(torch, "accelerator"):
            monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None, raising=False)
        for address, tag in enumerate(["weights", "weights", "kv_cache", "weights"]):
            data = allocation(1, tag)
            data.handle = (0, 1, address, 7)
            data.cpu_backup_tensor = torch.zeros(1) if tag == "weights" else None
            self.allocator.pointer_to_data[address] = data

    def map(self, handle: Any) -> None:
        if handle[2] in self.mapped:
            raise RuntimeError("CUDA Error: invalid argument")
        if len(self.mapped) >= self.capacity:
            raise RuntimeError("CUDA Error: out of memory")
        self.mapped.add(handle[2])

    def unmap(self, handle: Any) -> None:
        self.mapped.remove(handle[2])

    def wake(self, tags: list[str] | None = None) -> None:
        wake_up = worker_wake_up(lambda _worker, tags: self.allocator.wake_up(tags))
        wake_up(SimpleNamespace(kvcached=object(), model_runner=object()), tags)


@pytest.mark.older_release
@pytest.mark.parametrize("capacity", [0, 1, 2, 3])
def test_a_wake_that_runs_out_of_memory_midway_leaves_all_asleep_and_can_be_tried_again(
    monkeypatch: pytest.MonkeyPatch, capacity: int
) -> None:
    memory = Memory(monkeypatch)
    memory.capacity = capacity
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"):
            memory.wake()
        assert memory.mapped == set()
        assert asleep_bytes(None, None) == 4
    memory.capacity = 100
    memory.restored.clear()
    memory.wake()
    assert memory.mapped == {0, 1, 2, 3}
    assert memory.restored == [0, 1, 3]  # the weights, from the copies that were kept
    assert asleep_bytes(None, None) == 0


def test_what_one_rank_or_call_woke_already_is_not_allocated_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = Memory(monkeypatch)
    memory.wake(["weights"])
    assert memory.mapped == {0, 1, 3}
    memory.wake()
    assert memory.mapped == {0, 1, 2, 3}
    assert memory.restored == [0, 1, 3]


@pytest.mark.older_release
@pytest.mark.parametrize(("is_hooked", "code"), [(True, 0), (False, -SIGSEGV)])
def test_a_quantised_cache_is_zeroed_at_a_wake_only_where_it_is_mapped(
    start_offline: Offline, *, is_hooked: bool, code: int
) -> None:
    ended = finish(start_offline({}, script_name="wake_quantised", hooked=is_hooked))
    assert ended.returncode == code, ended.errors  # what CUDA calls an illegal access
    assert ("woken" in ended.output) == is_hooked


@pytest.mark.slow
def test_a_request_to_a_sleeping_engine_waits_and_a_refused_wake_does_it_no_harm(
    start_offline: Offline, tmp_path: Path
) -> None:
    report = report_of(start_offline(ours(tmp_path), script_name="sleeping"))
    for round_ in report["rounds"]:
        assert "are missing on host" in round_["refusal"]
        assert "neighbour (" in round_["refusal"]
        assert round_["is_sleeping"]
        assert round_["asleep_outputs"] == []
        assert round_["tokens"] == report["tokens"]
        assert round_["announced_bytes"] == [0]
