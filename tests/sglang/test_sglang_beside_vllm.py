"""A real vLLM server and a real SGLang server on one pool: memory moves, and nobody is lost."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.answered import ask_meanwhile, set_and_reached, tokens_of
from helpers.sglang_engine import large_burst, start_sglang
from helpers.waiting import await_that

from kvcached_core.control import Outcome, set_limit
from kvcached_core.units import MIB
from kvcached_demo.harness.engines import SGLANG, VLLM
from kvcached_demo.harness.load import Completion
from kvcached_demo.harness.memory import Recorder
from kvcached_demo.harness.servers import Servers

pytestmark = [pytest.mark.sglang, pytest.mark.vllm, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
# Small, so that prompts which fill it are computed soon, and with as many pages as a large one.
POOL = 128 * MIB
PAGE = 4 * MIB
MAX_TOKENS = 512
NUM_ROUNDS = 4


class Pair(Servers):
    """One server of each kind."""

    def burst(self, *names: str) -> dict[str, list[Completion]]:
        return asyncio.run(self.send({name: large_burst(len(name), POOL) for name in names}))


@pytest.fixture(scope="module")
def pair(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    os.environ.setdefault("VLLM_PYTHON", str(ROOT / ".venv" / "bin" / "python"))
    environ = VLLM.host_environ | {"KVCACHED_DEBUG": "1", "KVCACHED_PAGE_BYTES": str(PAGE)}
    with Pair(tmp_path_factory.mktemp("sg"), POOL) as pair:
        words = (*VLLM.caching(is_on=True), *VLLM.running(32), *VLLM.longest(MAX_TOKENS))
        pair.start(VLLM, "vllm", model, *words, environ=environ)
        longest = SGLANG.longest(MAX_TOKENS)
        start_sglang(pair, "sglang", model, *longest, page_bytes=PAGE, pool_bytes=POOL)
        pair.wait_ready()
        yield pair


@pytest.fixture(scope="module")
def alone(pair: Pair) -> dict[str, list[list[int]]]:
    """What each answers while the other is idle."""
    return {name: tokens_of(pair.burst(name)[name]) for name in pair.by_name}


def check(answers: dict[str, list[Completion]], expected: dict[str, list[list[int]]]) -> None:
    for name, completions in answers.items():
        assert tokens_of(completions) == expected[name]


def test_bursts_in_turn_peak_at_more_than_the_pool_together(
    pair: Pair, alone: dict[str, list[list[int]]]
) -> None:
    def peaks() -> int:
        return sum(recorder.recording.peak_bytes(name) for name in pair.by_name)

    with Recorder(pair.open_ledger) as recorder:
        for _ in range(NUM_ROUNDS):  # on a slow machine requests end before all of them run
            for name in pair.by_name:
                check(pair.burst(name), alone)
            if peaks() >= 1.3 * POOL:
                break
    assert peaks() >= 1.3 * POOL
    assert all(view.free_bytes >= 0 for view in recorder.recording.views)


def test_a_dry_pool_means_waiting_not_failing(
    pair: Pair, alone: dict[str, list[list[int]]]
) -> None:
    with Recorder(pair.open_ledger) as recorder:
        check(pair.burst("vllm", "sglang"), alone)
    assert min(view.free_bytes for view in recorder.recording.views) < PAGE


def test_a_limit_holds_on_an_idle_server_without_a_request(pair: Pair) -> None:
    pair.burst("sglang")
    await_that(lambda: pair.view("sglang").used_bytes <= PAGE)
    await_that(lambda: pair.view("sglang").cached_bytes > 6 * PAGE)
    set_and_reached("sglang", "25%", pair.directory)
    assert pair.view("sglang").resident_bytes <= POOL // 4
    assert set_limit("sglang", "none", directory=pair.directory).outcome is Outcome.APPLIED


def test_a_limit_lowered_under_load_is_held_and_nobody_is_lost(
    pair: Pair, alone: dict[str, list[list[int]]]
) -> None:
    def lower() -> None:
        set_and_reached("sglang", "25%", pair.directory)

    def is_midway() -> bool:
        return pair.view("sglang").used_bytes >= POOL // 3

    burst = large_burst(len("sglang"), POOL)
    try:
        assert ask_meanwhile(pair["sglang"], burst, is_midway, lower) == alone["sglang"]
        assert pair.view("sglang").resident_bytes <= POOL // 4
    finally:
        set_limit("sglang", "none", directory=pair.directory)


def test_killing_sglang_during_its_burst_leaves_vllm_alone(
    pair: Pair, alone: dict[str, list[list[int]]]
) -> None:
    async def kill_midway() -> list[Completion]:
        lost = asyncio.create_task(pair["sglang"].send(large_burst(len("sglang"), POOL)))
        while pair.view("sglang").used_bytes < POOL // 3:
            assert not lost.done()
            await asyncio.sleep(0.01)
        kept = asyncio.create_task(pair["vllm"].send(large_burst(len("vllm"), POOL)))
        await asyncio.to_thread(pair["sglang"].kill)
        with pair.open_ledger() as ledger:
            await asyncio.to_thread(
                await_that,
                lambda: all(row.name != "sglang" for row in ledger.view().instances),
            )
        await lost
        return await kept

    check({"vllm": asyncio.run(kill_midway())}, alone)
