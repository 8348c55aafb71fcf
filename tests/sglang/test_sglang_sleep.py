"""Waking is a promise: SGLang's own handlers over a memory saver that only counts."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.sglang_elastic import hooked, make_engine
from sglang.srt.managers import io_struct
from sglang.srt.managers.communicator import FanOutCommunicator
from sglang.srt.managers.scheduler_components.weight_updater import (
    SchedulerWeightUpdaterManager as Updater,
)
from torch import distributed

from kvcached_core.config import read_config
from kvcached_core.engine.instance import Instance
from kvcached_core.memory.devices import host_device
from kvcached_core.memory.saved_memory import SavedMemory
from kvcached_core.units import MIB
from kvcached_sglang import sleep_hooks
from kvcached_sglang.engine import SglangEngine
from kvcached_sglang.hooks import get_new_batch_prefill
from kvcached_sglang.sleep_hooks import CUDA_GRAPH, KV_CACHE, WEIGHTS

pytestmark = pytest.mark.sglang

POOL = 64 * MIB
SIZES = {WEIGHTS: 30 * MIB, KV_CACHE: 4 * MIB, CUDA_GRAPH: 6 * MIB}


class Saver:
    """SGLang's adapter of its memory saver, with sizes for memory.

    It has what the ledger says that it has to ask for: a wake that asked for less is an error, as
    it is in the real one, which ends the process.
    """

    def __init__(self) -> None:
        self.reserved = 0
        self.calls: list[str] = []
        self.free_bytes = lambda: POOL

    @contextmanager
    def region(self, tag: str) -> Iterator[None]:
        self.reserved += SIZES[tag]
        yield

    def pause(self, tag: str) -> None:
        self.calls.append(f"pause {tag}")

    def resume(self, tag: str) -> None:
        assert self.free_bytes() >= SIZES[tag], "out of memory"
        self.calls.append(f"resume {tag}")


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


class Sleeper:
    """A scheduler's part that sleeps and wakes, SGLang's own, with our hooks on it."""

    def __init__(self, engine: SglangEngine, saver: Saver) -> None:
        self.engine, self.saver = engine, saver
        engine.saved = SavedMemory(lambda: saver.reserved)
        region = sleep_hooks.saver_region(lambda self, tag: self.region(tag))
        for tag in SIZES:
            with region(saver, tag=tag):
                pass
        self.updater = Updater.__new__(Updater)
        self.updater.offload_tags = set()
        self.updater.memory_saver_adapter = saver
        self.updater.tp_cpu_group = None
        self.updater.scheduler = None
        self.updater.flush_cache = lambda: True
        self.updater.is_fully_idle = lambda **_: True
        runner = SimpleNamespace(model=torch.nn.BatchNorm1d(2))
        self.updater.tp_worker = SimpleNamespace(model_runner=runner)

    def sleep(self, *tags: str) -> Any:
        request = io_struct.ReleaseMemoryOccupationReqInput(tags=list(tags) or None)
        return self.updater.release_memory_occupation(request)

    def wake(self, *tags: str) -> Any:
        request = io_struct.ResumeMemoryOccupationReqInput(tags=list(tags) or None)
        return self.updater.resume_memory_occupation(request)


@pytest.fixture
def sleeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sleeper]:
    monkeypatch.setattr("kvcached_core.engine.ranks.PATIENCE_SECONDS", 0.2)
    engine = make_engine(tmp_path, host_pool=POOL)
    if hasattr(Updater, "_assert_weight_cache_inactive"):
        monkeypatch.setattr(Updater, "_assert_weight_cache_inactive", lambda *_: None)
    with hooked(
        engine,
        (Updater, "release_memory_occupation", sleep_hooks.release_memory_occupation),
        (Updater, "resume_memory_occupation", sleep_hooks.resume_memory_occupation),
    ):
        yield Sleeper(engine, Saver())
    engine.close()


@pytest.fixture
def neighbour(tmp_path: Path) -> Iterator[Instance]:
    config = read_config({"KVCACHED_DIR": str(tmp_path), "KVCACHED_HOST_POOL": str(POOL)})
    instance = Instance(
        [host_device(config)],
        config,
        name="neighbour",
        default_name="",
        engine="test",
        on_ring=lambda: None,
    )
    instance.describe(page_bytes=2 * MIB, num_pages=32)
    yield instance
    instance.close()


def announced_bytes(engine: SglangEngine) -> int:
    instance = engine.ranks.instance
    assert instance is not None
    (ledger,) = instance._ledgers.values()
    return next(row.static_bytes for row in ledger.view().instances if row.name == "m")


def test_what_comes_back_is_announced_while_it_comes_and_not_after(sleeper: Sleeper) -> None:
    seen: list[int] = []
    sleeper.saver.free_bytes = lambda: (seen.append(announced_bytes(sleeper.engine)), POOL)[1]
    sleeper.sleep()
    assert sleeper.wake().rid is None
    assert seen == [sum(SIZES.values())] * len(SIZES)
    assert announced_bytes(sleeper.engine) == 0
    assert [call for call in sleeper.saver.calls if "resume" in call] == [
        "resume cuda_graph",
        "resume weights",
        "resume kv_cache",
    ]


@pytest.mark.parametrize("tags", [(WEIGHTS,), (KV_CACHE, CUDA_GRAPH)])
def test_only_what_is_resumed_is_asked_for(sleeper: Sleeper, tags: tuple[str, ...]) -> None:
    seen: list[int] = []
    sleeper.saver.free_bytes = lambda: (seen.append(announced_bytes(sleeper.engine)), POOL)[1]
    sleeper.sleep()
    assert sleeper.wake(*tags).rid is None
    assert set(seen) == {sum(SIZES[tag] for tag in tags)}
    assert sleeper.updater.offload_tags == set(SIZES) - set(tags)


def test_without_room_a_wake_is_refused_with_nothing_touched_and_granted_later(
    sleeper: Sleeper, neighbour: Instance
) -> None:
    sleeper.sleep()
    before = list(sleeper.saver.calls)
    assert neighbour.promise(20, is_urgent=False) == 20
    answer = sleeper.wake()
    assert answer.rid.startswith(
        "kvcached: there is no room to wake up: 16 MiB of 40 MiB are missing"
    )
    assert "neighbour (40 MiB)" in answer.rid
    assert sleeper.saver.calls == before
    assert sleeper.updater.offload_tags == set(SIZES)
    assert announced_bytes(sleeper.engine) == 0
    neighbour.cancel(20)
    assert sleeper.wake().rid is None
    assert not sleeper.updater.offload_tags


def test_what_was_not_released_cannot_be_resumed_and_ends_nothing(sleeper: Sleeper) -> None:
    assert "weights, cuda_graph cannot be resumed: not released" in (
        sleeper.sleep(KV_CACHE) and sleeper.wake(WEIGHTS, CUDA_GRAPH).rid
    )
    assert sleeper.updater.offload_tags == {KV_CACHE}


def test_what_a_capture_allocates_comes_back_with_the_graphs(sleeper: Sleeper) -> None:
    before = sleeper.engine.saved.bytes_of([CUDA_GRAPH])
    capture = sleep_hooks.saver_region(lambda self: self.region(CUDA_GRAPH))
    with capture(sleeper.saver):
        pass
    assert sleeper.engine.saved.bytes_of([CUDA_GRAPH]) == before + SIZES[CUDA_GRAPH]


def test_a_request_to_a_sleeping_engine_waits(sleeper: Sleeper) -> None:
    scheduler = SimpleNamespace(weight_updater=sleeper.updater, chunked_req=None)
    schedule = get_new_batch_prefill(lambda _: "a batch")
    sleeper.sleep(WEIGHTS)
    assert schedule(scheduler) is None
    sleeper.wake(WEIGHTS)
    assert schedule(scheduler) == "a batch"


def test_a_refused_wake_is_an_error_of_its_caller() -> None:
    async def call(answer: Any) -> Any:
        communicator: Any = FanOutCommunicator(lambda _: None, 1)
        sleep_hooks.make_refusable(communicator)
        waiting = asyncio.create_task(communicator("wake up"))
        await asyncio.sleep(0)
        communicator.handle_recv(answer)
        return await waiting

    good = io_struct.ResumeMemoryOccupationReqOutput()
    assert asyncio.run(call(good)) == [good]
    with pytest.raises(ValueError, match="no room"):
        asyncio.run(call(sleep_hooks._refused("no room")))


def test_a_reason_survives_the_way_to_the_front_end() -> None:
    refused = sleep_hooks._refused("no room")
    if not hasattr(io_struct, "msgpack_encode"):
        pytest.skip("this release pickles what it sends")
    sent = io_struct.msgpack_encode(refused)
    assert io_struct._msgpack_decoder.decode(sent).rid == "no room"
