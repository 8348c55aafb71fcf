"""Two engines with equal load on a pool that is too small for both: each gets its half of it.

SGLang's own pool and allocator under our engine; requests are let in, decoded and ended in the
order of its scheduler, a turn of both engines every ten milliseconds of a clock of our own.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.no_pace import HeardBell, let_no_pace_count
from helpers.sglang_elastic import NoCache, make_allocator, make_engine

from kvcached_core.units import MIB
from kvcached_sglang.engine import SglangEngine

pytestmark = pytest.mark.sglang

PAGE_BYTES = 2 * MIB
NUM_PAGES = 16
PAGE_TOKENS = 64
SHORT, LONG = 40, 300  # tokens of prompts
ANSWERS = (31, 67, 44, 90, 53, 38, 79, 60)  # tokens; so that requests end one after the other
TURN_SECONDS = 0.01
NUM_TURNS_ALONE = 100


class Clock:
    """The time of everything."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def monotonic_ns(self) -> int:
        return int(self.now * 1e9)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(time, "monotonic", made.monotonic)
    monkeypatch.setattr(time, "monotonic_ns", made.monotonic_ns)
    monkeypatch.setattr(time, "time_ns", made.monotonic_ns)
    return made


@pytest.fixture(autouse=True)
def _no_pace_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    let_no_pace_count(monkeypatch.setattr)


@dataclass
class Request:
    """What a client waits for."""

    num_prompt_tokens: int
    num_answer_tokens: int
    output_ids: list[int] = field(default_factory=list)
    ids: list[torch.Tensor] = field(default_factory=list)

    @property
    def origin_input_ids(self) -> list[int]:
        return [7] * self.num_prompt_tokens

    @property
    def sampling_params(self) -> Any:
        return SimpleNamespace(max_new_tokens=self.num_answer_tokens)


class Server:
    """An engine, and a scheduler that does what SGLang's does with it."""

    def __init__(self, engine: SglangEngine, allocator: Any, num_prompt_tokens: int) -> None:
        self.engine, self.allocator = engine, allocator
        self.num_completed = self.num_retracted = self.num_tokens = 0
        requests = [Request(num_prompt_tokens, number) for number in ANSWERS]
        self.scheduler: Any = SimpleNamespace(
            running_batch=SimpleNamespace(reqs=[], batch_is_full=False),
            last_batch=None,
            chunked_req=None,
            waiting_queue=deque(requests),
            tree_cache=NoCache(),
        )
        engine.port.scheduler = self.scheduler

    def turn(self) -> None:
        running, queue = self.scheduler.running_batch.reqs, self.scheduler.waiting_queue
        self.engine.before_schedule()
        if not self.engine.must_hold():
            while queue and self.fits(queue[0]):
                request = queue.popleft()
                request.ids.append(self.alloc(request.num_prompt_tokens + len(request.output_ids)))
                running.append(request)
        while self.allocator.available_size() < len(running):
            self.retract(running.pop())
        self.num_tokens += sum(one.num_prompt_tokens + len(one.output_ids) for one in running)
        for request in list(running):
            request.ids.append(self.alloc(1))
            request.output_ids.append(1)
            if len(request.output_ids) == request.num_answer_tokens:
                running.remove(request)
                self.free(request)
                self.num_completed += 1
                queue.append(Request(request.num_prompt_tokens, request.num_answer_tokens))
        self.engine.after_schedule(has_batch=bool(running))

    def fits(self, request: Request) -> bool:
        to_come = sum(
            one.num_answer_tokens - len(one.output_ids) for one in self.scheduler.running_batch.reqs
        )
        needed = request.num_prompt_tokens + request.num_answer_tokens + to_come
        return bool(self.allocator.available_size() >= needed)

    def alloc(self, num_tokens: int) -> torch.Tensor:
        ids = self.allocator.alloc(num_tokens)
        assert ids is not None, "an allocation that fails ends SGLang"
        return ids

    def free(self, request: Request) -> None:
        self.allocator.free(torch.cat(request.ids))
        request.ids.clear()

    def retract(self, request: Request) -> None:
        self.free(request)
        self.num_retracted += 1
        self.scheduler.waiting_queue.appendleft(request)


@pytest.fixture
def start(tmp_path: Path, clock: Clock) -> Iterator[Callable[[int], Server]]:
    servers: list[Server] = []

    def start_one(num_prompt_tokens: int) -> Server:
        engine = make_engine(
            tmp_path, host_pool=PAGE_BYTES * NUM_PAGES, page_bytes=PAGE_BYTES, idle_seconds=0
        )
        allocator = make_allocator(engine, NUM_PAGES * PAGE_TOKENS - 1)
        servers.append(Server(engine, allocator, num_prompt_tokens))
        return servers[-1]

    yield start_one
    for server in servers:
        server.allocator.get_kvcache().k_buffer.clear()
        server.allocator.get_kvcache().v_buffer.clear()
        assert server.engine.memory is not None
        server.engine.memory.close()
        server.engine.close()


def run(servers: list[Server], clock: Clock, num_turns: int) -> None:
    """Let the second server come when the first one has taken what there is."""
    for number in range(-NUM_TURNS_ALONE, num_turns):
        for server in servers[: 1 + (number >= 0)]:
            server.turn()
        if number == 0:
            for server in servers:
                server.num_completed = server.num_retracted = server.num_tokens = 0
        HeardBell.hear()
        clock.now += TURN_SECONDS


def test_who_comes_second_completes_as_many_requests_as_who_came_first(
    start: Callable[[int], Server], clock: Clock
) -> None:
    servers = [start(100), start(100)]
    run(servers, clock, 1500)
    completed = [server.num_completed for server in servers]
    assert min(completed) >= 0.85 * max(completed)
    assert sum(completed) > 100


def test_long_requests_get_as_much_memory_as_short_ones(
    start: Callable[[int], Server], clock: Clock
) -> None:
    servers = [start(SHORT), start(LONG)]
    run(servers, clock, 6000)
    held = [server.num_tokens for server in servers]
    assert min(held) >= 0.7 * max(held)
    assert servers[1].num_retracted <= 12  # work that is lost


def test_requests_are_let_in_again_when_a_neighbour_gave_something(
    start: Callable[[int], Server], clock: Clock
) -> None:
    full, waiting = start(100), start(100)
    for server in (full, waiting):
        server.turn()
        clock.now += TURN_SECONDS
    assert waiting.scheduler.waiting_queue
    waiting.scheduler.running_batch.reqs.append(Request(1, 1))  # SGLang's flag holds while one runs
    waiting.scheduler.running_batch.batch_is_full = True
    waiting.engine.before_schedule()
    assert waiting.scheduler.running_batch.batch_is_full
    waiting.engine.after_schedule(has_batch=True)
    for request in full.scheduler.running_batch.reqs:
        full.free(request)
    full.scheduler.running_batch.reqs.clear()
    full.engine.empty()
    clock.now += TURN_SECONDS
    waiting.engine.before_schedule()
    assert not waiting.scheduler.running_batch.batch_is_full
    waiting.engine.after_schedule(has_batch=True)
