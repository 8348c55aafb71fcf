"""A scheduler that has nothing to run leaves the interpreter to the threads that unmap."""

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.sglang_elastic import NoCache, make_allocator, make_engine, tell

from kvcached_core.engine import looping
from kvcached_core.memory.keeper import PageKeeper
from kvcached_core.memory.vmm.host import HostBackend
from kvcached_core.units import MIB
from kvcached_sglang.engine import SglangEngine

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(60)]

PAGE_TOKENS = 64
NUM_PAGES = 16
NUM_AT_REST = 2  # page 0, and one that a quiet engine keeps


class Fence:
    """A fence that is passed when the test says so."""

    def __init__(self, passed: threading.Event) -> None:
        self.passed = passed

    def wait(self) -> None:
        assert self.passed.wait(30)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[SglangEngine]:
    """Return an engine whose prompt of half the pool has just ended."""
    made = make_engine(tmp_path, host_pool=NUM_PAGES * 2 * MIB, page_bytes=2 * MIB, idle_seconds=0)
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
