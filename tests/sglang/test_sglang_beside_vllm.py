"""A real vLLM server and a real SGLang server on one pool: memory moves, and nobody is lost."""

import asyncio
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers.sglang_engine import POOL, large_burst, start_sglang
from helpers.waiting import await_that

from kvcached_core.control import Outcome, set_limit
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.view import InstanceView
from kvcached_core.units import MIB
from kvcached_demo.harness.load import Completion
from kvcached_demo.harness.memory import Recorder
from kvcached_demo.harness.server import EngineServer

pytestmark = [pytest.mark.sglang, pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]
VLLM_PYTHON = os.environ.get("VLLM_PYTHON", str(ROOT / ".venv" / "bin" / "python"))
PAGE = 16 * MIB
NUM_ROUNDS = 4


@dataclass
class Pair:
    """One server of each kind."""

    workspace: Path
    servers: dict[str, EngineServer]

    @property
    def ledger_path(self) -> Path:
        return self.workspace / "kv" / "host.ledger"

    def view(self, name: str) -> InstanceView:
        with Ledger(self.ledger_path) as ledger:
            return next(view for view in ledger.view().instances if view.name == name)

    def burst(self, *names: str) -> dict[str, list[Completion]]:
        async def send_all() -> list[list[Completion]]:
            return await asyncio.gather(
                *(self.servers[name].send(large_burst(len(name))) for name in names)
            )

        return dict(zip(names, asyncio.run(send_all()), strict=True))


def start_vllm(model: Path, workspace: Path) -> EngineServer:
    environ = {
        "ENABLE_KVCACHED": "1",
        "KVCACHED_DIR": str(workspace / "kv"),
        "KVCACHED_HOST_POOL": str(POOL),
        "KVCACHED_NAME": "vllm",
        "KVCACHED_DEBUG": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    return EngineServer(
        "vllm",
        model,
        workspace,
        environ=environ,
        arguments=("--enable-prefix-caching", "--max-num-seqs", "32"),
        core=1,
        python=VLLM_PYTHON,
    )


@pytest.fixture(scope="module")
def pair(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    workspace = tmp_path_factory.mktemp("sg")
    pair = Pair(workspace, {"vllm": start_vllm(model, workspace)})
    pair.servers["sglang"] = start_sglang("sglang", model, workspace)
    try:
        for server in pair.servers.values():
            server.wait_ready()
        yield pair
    finally:
        for server in pair.servers.values():
            server.kill()


@pytest.fixture(scope="module")
def alone(pair: Pair) -> dict[str, list[list[int]]]:
    """What each answers while the other is idle."""
    return {
        name: [completion.token_ids for completion in pair.burst(name)[name]]
        for name in pair.servers
    }


def check(answers: dict[str, list[Completion]], expected: dict[str, list[list[int]]]) -> None:
    for name, completions in answers.items():
        assert [completion.error for completion in completions] == [None] * len(completions)
        assert [completion.token_ids for completion in completions] == expected[name]


def test_bursts_in_turn_peak_at_more_than_the_pool_together(
    pair: Pair, alone: dict[str, list[list[int]]]
) -> None:
    def peaks() -> int:
        return sum(recorder.recording.peak_bytes(name) for name in pair.servers)

    with Recorder(pair.ledger_path) as recorder:
        for _ in range(NUM_ROUNDS):  # on a slow machine requests end before all of them run
            for name in pair.servers:
                check(pair.burst(name), alone)
            if peaks() >= 1.3 * POOL:
                break
    assert peaks() >= 1.3 * POOL
    assert all(view.free_bytes >= 0 for view in recorder.recording.views)


def test_a_dry_pool_means_waiting_not_failing(
    pair: Pair, alone: dict[str, list[list[int]]]
) -> None:
    with Recorder(pair.ledger_path) as recorder:
        check(pair.burst("vllm", "sglang"), alone)
    assert min(view.free_bytes for view in recorder.recording.views) < PAGE


def test_a_limit_holds_on_an_idle_server_without_a_request(pair: Pair) -> None:
    pair.burst("sglang")
    await_that(lambda: pair.view("sglang").used_bytes <= PAGE, 10)
    await_that(lambda: pair.view("sglang").cached_bytes > 6 * PAGE, 10)
    answer = set_limit("sglang", "25%", directory=pair.workspace / "kv")
    assert answer.outcome is Outcome.APPLIED
    assert pair.view("sglang").resident_bytes <= POOL // 4
    assert set_limit("sglang", "none", directory=pair.workspace / "kv").outcome is Outcome.APPLIED


def test_a_limit_lowered_under_load_is_held_and_nobody_is_lost(
    pair: Pair, alone: dict[str, list[list[int]]]
) -> None:
    async def lower_midway() -> list[Completion]:
        load = asyncio.create_task(pair.servers["sglang"].send(large_burst(len("sglang"))))
        while pair.view("sglang").used_bytes < POOL // 3:
            assert not load.done()
            await asyncio.sleep(0.01)
        answer = await asyncio.to_thread(
            set_limit, "sglang", "25%", directory=pair.workspace / "kv", wait_seconds=10.0
        )
        assert answer.outcome is Outcome.APPLIED
        return await load

    try:
        answers = asyncio.run(lower_midway())
        assert pair.view("sglang").resident_bytes <= POOL // 4
    finally:
        set_limit("sglang", "none", directory=pair.workspace / "kv")
    check({"sglang": answers}, alone)


def test_killing_sglang_during_its_burst_leaves_vllm_alone(
    pair: Pair, alone: dict[str, list[list[int]]]
) -> None:
    async def kill_midway() -> list[Completion]:
        lost = asyncio.create_task(pair.servers["sglang"].send(large_burst(len("sglang"))))
        while pair.view("sglang").used_bytes < POOL // 3:
            assert not lost.done()
            await asyncio.sleep(0.01)
        kept = asyncio.create_task(pair.servers["vllm"].send(large_burst(len("vllm"))))
        await asyncio.to_thread(pair.servers["sglang"].kill)
        with Ledger(pair.ledger_path) as ledger:
            await asyncio.to_thread(
                await_that,
                lambda: all(row.name != "sglang" for row in ledger.view().instances),
                60,
            )
        await lost
        return await kept

    check({"vllm": asyncio.run(kill_midway())}, alone)
