"""A neighbour's ring at any moment of vLLM's own loop is answered before the loop waits again."""

import queue
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
from helpers.configurations import configuration
from helpers.waiting import PATIENCE_SECONDS
from vllm.v1.engine.core import EngineCoreProc, EngineShutdownState

from kvcached_core.config import HOST, read_config
from kvcached_core.engine.engine import ElasticEngine
from kvcached_core.engine.giving import Giving
from kvcached_core.engine.instance import Instance
from kvcached_core.engine.ranks import Ranks
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.memory.devices import Device
from kvcached_core.units import MIB
from kvcached_vllm.engine import VllmEngine
from kvcached_vllm.engine_hooks import engine_core_post_step
from kvcached_vllm.port import VllmPort

pytestmark = pytest.mark.vllm

BLOCK_BYTES = 65536
NUM_BLOCKS = 256
DEVICE = Device(HOST, "host", 256 * MIB)
LOOP = (
    EngineCoreProc._process_input_queue,
    EngineCoreProc._notify_idle_state_callbacks,
    EngineCoreProc._process_engine_step,
    ElasticEngine.answer_ring,
    ElasticEngine.between_steps,
    ElasticEngine.rest,
    ElasticEngine._tell,
    Giving.give,
    Ranks.look,
    Instance.has_news,
    Instance.wanted_pages,
    Instance.acknowledge,
)


class WouldWait(BaseException):
    """The loop has nothing left to do."""


class Inbox(queue.Queue[Any]):
    """vLLM's queue of inputs: where the loop would wait, it says so."""

    def get(self, block: bool = True, timeout: float | None = None) -> Any:  # noqa: FBT001, FBT002  the base's
        if block and self.empty():
            raise WouldWait
        return super().get(block, timeout)


class Core(EngineCoreProc):
    """vLLM's engine core with its own loop, without sockets, scheduler and model."""

    post_step = engine_core_post_step(lambda _self, _is_executed: None)

    def __init__(self) -> None:
        self.input_queue = Inbox()
        self.output_queue = queue.Queue()
        self.aborts_queue = queue.Queue()
        self._idle_state_callbacks = []
        self.process_input_queue_block = True
        self.shutdown_state = EngineShutdownState.RUNNING
        self.engines_running = self.publish_dp_lb_stats = False
        self.batch_queue = None
        self.num_steps_left = 0
        self.step_fn = self.count_step
        self.scheduler = SimpleNamespace(
            has_requests=lambda: self.num_steps_left > 0,
            get_request_counts=lambda: (self.num_steps_left, 0),
            has_unfinished_requests=lambda: self.num_steps_left > 0,
            kv_cache_manager=SimpleNamespace(take_events=list),
        )
        self.model_executor = SimpleNamespace(collective_rpc=lambda *_call, **_options: [])

    def count_step(self) -> tuple[dict[int, Any], bool]:
        self.num_steps_left -= 1
        return {}, True

    def run_until_it_waits(self) -> None:
        with pytest.raises(WouldWait):
            self.run_busy_loop()

    def run_if_woken(self) -> None:
        while not self.input_queue.empty():
            self.run_until_it_waits()


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[VllmEngine]:
    config = read_config({"KVCACHED_DIR": str(tmp_path / "kv"), "KVCACHED_IDLE_SECONDS": "1000"})
    vllm_config = configuration(model_config=SimpleNamespace(model="m", max_model_len=2048))
    core = Core()
    core.kvcached = made = VllmEngine(vllm_config, config, [DEVICE], core)
    tensors = [SimpleNamespace(size=BLOCK_BYTES * NUM_BLOCKS) for _ in range(8)]
    made.place(
        [SimpleNamespace(kv_cache_tensors=tensors, num_blocks=NUM_BLOCKS, kv_cache_groups=[])],
        2 * MIB,
    )
    made.build_pool(
        num_gpu_blocks=NUM_BLOCKS,
        enable_caching=False,
        hash_block_size=16,
        enable_kv_cache_events=False,
    )
    yield made
    made.close()


@pytest.fixture
def ledger(engine: VllmEngine) -> Iterator[Ledger]:
    """Return the engine's ledger, as a neighbour opens it; it believes that pages are idle."""
    seat = engine.instance.seat(DEVICE)
    with Ledger(Path(seat.ledger_path)) as opened:
        num_bytes = 8 * engine.instance.page_bytes
        opened.settle(seat.row, mapped_bytes=num_bytes, used_bytes=0, cached_bytes=0)
        yield opened


def at_line(
    number: int, functions: tuple[Callable[..., Any], ...], do: Callable[[], None]
) -> list[str]:
    """Call `do` in front of the line that `functions` run as their `number`th from now on.

    Returns:
        Where that was, when it has been.
    """
    codes = {function.__code__ for function in functions}
    where: list[str] = []
    num_lines = count()

    def trace(frame: FrameType, event: str, _arg: object) -> Any:
        if frame.f_code not in codes or where:
            return None
        if event == "line" and next(num_lines) == number:
            where.append(f"{frame.f_code.co_qualname}:{frame.f_lineno}")
            sys.settrace(None)
            do()
            return None
        return trace

    sys.settrace(trace)
    return where


@pytest.mark.parametrize("num_steps", [0, 2])
def test_a_ring_at_any_line_of_the_loop_is_answered(
    engine: VllmEngine, ledger: Ledger, num_steps: int
) -> None:
    row = engine.instance.seat(DEVICE).row
    seen = set()

    def ask_and_ring() -> None:
        assert ledger.ask(row, ledger.wanted(row).asked_bytes + engine.instance.page_bytes)
        engine.ring()

    for number in count():
        engine.port.core.num_steps_left = num_steps
        ledger.ask(row, engine.instance.page_bytes)
        engine.ring()
        where = at_line(number, LOOP, ask_and_ring)
        try:
            engine.port.core.run_if_woken()
        finally:
            sys.settrace(None)
        assert ledger.wanted(row).asked_bytes == 0, where
        if not where:
            break
        seen.update(where)
    assert len(seen) > 40


def test_a_loop_that_runs_at_any_line_of_a_ring_misses_nothing(
    engine: VllmEngine, ledger: Ledger
) -> None:
    row = engine.instance.seat(DEVICE).row
    for number in count():
        ledger.ask(row, engine.instance.page_bytes)
        where = at_line(
            number, (ElasticEngine.ring, VllmPort.wake), engine.port.core.run_until_it_waits
        )
        try:
            engine.ring()
        finally:
            sys.settrace(None)
        engine.port.core.run_if_woken()
        assert ledger.wanted(row).asked_bytes == 0, where
        if not where:
            break
    assert number >= 4


STOPPED_START = """
import queue
from types import SimpleNamespace
from kvcached_vllm.port import VllmPort

core = SimpleNamespace(input_queue=queue.Queue())  # the rest of it did not come
VllmPort(core).wake(lambda: None)
"""


def test_a_start_that_fails_ends_its_process_though_somebody_rang() -> None:
    command = [sys.executable, "-c", STOPPED_START]
    ended = subprocess.run(
        command, check=False, timeout=PATIENCE_SECONDS, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stderr) == (0, "")
