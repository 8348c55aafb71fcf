"""A scheduler with nothing to run leaves the interpreter to threads that unmap, or sleeps."""

import select
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zmq
from helpers.sglang_elastic import (
    NoCache,
    hooked,
    let_schedule,
    make_allocator,
    make_engine,
    tell,
)
from helpers.waiting import PATIENCE_SECONDS

from kvcached_core import control
from kvcached_core.engine import looping, page_book
from kvcached_core.memory.keeper import PageKeeper
from kvcached_core.memory.vmm.host import HostBackend
from kvcached_core.units import MIB
from kvcached_sglang import hooks
from kvcached_sglang.engine import SglangEngine

pytestmark = [pytest.mark.sglang]

PAGE_TOKENS = 64
NUM_PAGES = 16
NUM_AT_REST = 2  # page 0, and one that a quiet engine keeps


class Fence:
    """A fence that is passed when the test says so."""

    def __init__(self, passed: threading.Event) -> None:
        self.passed = passed

    def wait(self) -> None:
        assert self.passed.wait(30)


@pytest.fixture(params=[0])
def engine(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[SglangEngine]:
    """Return an engine whose prompt of half the pool has just ended; the parameter: it lingers."""
    sizes = {"host_pool": NUM_PAGES * 2 * MIB, "page_bytes": 2 * MIB}
    made = make_engine(tmp_path, idle_seconds=request.param, **sizes)
    allocator = make_allocator(made, NUM_PAGES * PAGE_TOKENS - 1)
    pool = allocator.get_kvcache()
    ids = allocator.alloc(NUM_PAGES // 2 * PAGE_TOKENS)
    tell(made)
    allocator.free(ids)
    yield made
    pool.k_buffer.clear()
    pool.v_buffer.clear()
    assert made.memory is not None
    made.memory.close()
    made.close()


@pytest.fixture
def stepped_aside(
    engine: SglangEngine, monkeypatch: pytest.MonkeyPatch
) -> Iterator[threading.Event]:
    """Return what is set when the scheduler's thread waits; nothing is unmapped before."""
    assert engine.memory is not None
    engine.memory.keeper.wait()
    event = threading.Event()
    wait = PageKeeper.wait

    def wait_and_say_so(keeper: PageKeeper, seconds: float | None = None) -> None:
        event.set()
        wait(keeper, seconds)

    monkeypatch.setattr(HostBackend, "fence", lambda _self, _stream: Fence(event))
    monkeypatch.setattr(PageKeeper, "wait", wait_and_say_so)
    monkeypatch.setattr(looping, "STEP_ASIDE_SECONDS", 30)
    yield event
    event.set()


def turn(engine: SglangEngine, **state: Any) -> None:
    idle = {"last_batch": None, "chunked_req": None, "waiting_queue": [], "tree_cache": NoCache()}
    scheduler = SimpleNamespace(running_batch=SimpleNamespace(reqs=[]), **(idle | state))
    engine.port.scheduler = scheduler
    engine.before_schedule()
    engine.after_schedule(has_batch=False)


def num_resident(engine: SglangEngine) -> int:
    assert engine.memory is not None
    return len(engine.memory.arena.resident_pages)


def test_pages_are_given_back_in_the_turn_that_closed_them(
    engine: SglangEngine, stepped_aside: threading.Event
) -> None:
    assert num_resident(engine) > NUM_PAGES // 2
    turn(engine)
    assert num_resident(engine) == NUM_AT_REST
    assert stepped_aside.is_set()


def test_a_turn_whose_last_batch_has_to_be_looked_at_goes_on(
    engine: SglangEngine, stepped_aside: threading.Event
) -> None:
    turn(engine, last_batch=SimpleNamespace(reqs=[]))
    assert not stepped_aside.is_set()


class Sleeper:
    """SGLang's idle sleeper, which sleeps until somebody rings."""

    def __init__(self) -> None:
        self.poller = zmq.Poller()
        self.polled: list[Any] = []

    def maybe_sleep(self) -> None:
        self.polled.append(self.poller.poll(PATIENCE_SECONDS * 1000))


class Loop:
    """A scheduler's end of an idle turn."""

    def __init__(self, idle_sleeper: Any) -> None:
        self.idle_sleeper = idle_sleeper

    def maybe_sleep_on_idle(self) -> None:
        self.idle_sleeper.maybe_sleep()


def sleep(engine: SglangEngine, sleeper: Any) -> None:
    with hooked(engine, (Loop, "maybe_sleep_on_idle", hooks.maybe_sleep_on_idle)):
        Loop(sleeper).maybe_sleep_on_idle()


def test_who_wants_memory_ends_the_sleep_and_gets_it(engine: SglangEngine, tmp_path: Path) -> None:
    sleeper = Sleeper()
    turn(engine)
    control.trim([], directory=tmp_path, wait_seconds=0)
    sleep(engine, sleeper)
    assert sleeper.polled == [[(engine.port.nap.descriptor, select.POLLIN)]]
    turn(engine)
    assert engine.memory is not None
    engine.memory.keeper.wait()
    assert num_resident(engine) == NUM_AT_REST - 1


@pytest.mark.parametrize("engine", [0.05], indirect=True)
def test_what_lingers_goes_although_nobody_wants_it(engine: SglangEngine) -> None:
    sleeper = Sleeper()
    turn(engine)
    while num_resident(engine) > NUM_AT_REST:
        sleep(engine, sleeper)
        turn(engine)
        assert engine.memory is not None
        engine.memory.keeper.wait()
    assert all(sleeper.polled)
    assert sleeper.polled


@pytest.mark.parametrize("engine", [PATIENCE_SECONDS], indirect=True)
def test_others_see_before_a_sleep_what_is_not_used_any_more(
    engine: SglangEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def used_pages() -> int:
        (device,) = control.devices(tmp_path)
        (view,) = device.instances
        return view.used_bytes // view.page_bytes

    monkeypatch.setattr(page_book, "REPORT_SECONDS", PATIENCE_SECONDS)
    let_schedule(engine, NoCache())
    engine.before_schedule()
    allocator = engine.free_lists[0]._allocator
    ids = allocator.alloc(4 * PAGE_TOKENS)
    engine.after_schedule(has_batch=True)
    tell(engine)
    assert used_pages() > 4
    allocator.free(ids)
    turn(engine)
    seen: list[int] = []
    sleeper = SimpleNamespace(poller=zmq.Poller(), maybe_sleep=lambda: seen.append(used_pages()))
    sleep(engine, sleeper)
    assert seen == [1]


@pytest.mark.parametrize("engine", [PATIENCE_SECONDS], indirect=True)
@pytest.mark.parametrize("last_batch", [None, SimpleNamespace(reqs=["launched before"])])
def test_a_paused_loop_gives_memory_whether_a_batch_is_in_flight_or_not(
    engine: SglangEngine, tmp_path: Path, last_batch: Any
) -> None:
    let_schedule(engine, NoCache())
    tell(engine)
    scheduler = engine.port.scheduler
    scheduler._engine_paused, scheduler.last_batch = True, last_batch
    control.trim([], directory=tmp_path, wait_seconds=0)
    assert num_resident(engine) > NUM_PAGES // 2
    with hooked(engine):
        hooks.process_input_requests(lambda *_: None)(scheduler, [])
    assert engine.memory is not None
    engine.memory.keeper.wait()
    assert num_resident(engine) == 1


def test_nobody_sleeps_while_copies_keep_what_is_asked(engine: SglangEngine) -> None:
    slept: list[bool] = []
    sleeper = SimpleNamespace(poller=zmq.Poller(), maybe_sleep=lambda: slept.append(True))
    turn(engine)
    for is_awaiting in (True, False):
        engine.giving.is_awaiting = is_awaiting
        sleep(engine, sleeper)
        assert bool(slept) is not is_awaiting


def test_a_sleep_without_a_poller_stays_as_it_is(engine: SglangEngine) -> None:
    slept: list[bool] = []
    turn(engine)
    sleep(engine, SimpleNamespace(maybe_sleep=lambda: slept.append(True)))
    assert slept
