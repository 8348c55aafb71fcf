"""Two real vLLM servers on one pool: memory moves between them, and nobody is lost.

Server A runs as vLLM's default three processes without prefix caching, server B in two processes
with it. A's first start is as users start it; the others are forked from a parent that has imported
vLLM. The tests follow each other on the same two servers; each leaves both idle.
"""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.answered import tokens_of
from helpers.process_memory import resident_by_proc
from helpers.waiting import PATIENCE_SECONDS, await_that
from helpers.warm_servers import launch_warm

from kvcached_core.control import Outcome, set_floor, set_limit, trim
from kvcached_core.units import MIB
from kvcached_demo.harness.engines import VLLM
from kvcached_demo.harness.load import Burst, Completion, make_burst
from kvcached_demo.harness.memory import Recorder
from kvcached_demo.harness.model import KV_BYTES_PER_TOKEN, make_model
from kvcached_demo.harness.server import EngineServer, start_cold
from kvcached_demo.harness.servers import Servers

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

# Small, so that prompts which fill it are computed soon, and with as many pages as a large one.
POOL = 128 * MIB
PAGE = 4 * MIB
MAX_TOKENS = 512
NUM_ROUNDS = 4
SHARE = 0.7
NUM_REQUESTS = 12
NUM_OUTPUT_TOKENS = 64


class Pair(Servers):
    """Two servers on the pool, each with a model of its own."""

    def __init__(self, workspace: Path) -> None:
        super().__init__(workspace, POOL, launch_warm)
        self.models = {
            name: make_model(workspace / name, seed=seed) for seed, name in enumerate("ab", 1)
        }

    def begin(self, name: str) -> EngineServer:
        is_first = name == "a"
        processes = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"} if is_first else VLLM.host_environ
        return self.start(
            VLLM,
            name,
            self.models[name],
            *VLLM.caching(is_on=not is_first),
            *VLLM.running(32),
            *VLLM.longest(MAX_TOKENS),
            environ={"KVCACHED_DEBUG": "1", "KVCACHED_PAGE_BYTES": str(PAGE), **processes},
            launch=start_cold if is_first and name not in self.by_name else None,
        )

    def burst(self, *names: str) -> dict[str, list[Completion]]:
        return asyncio.run(self.send({name: make(name) for name in names}))


def make(name: str) -> Burst:
    """Return a burst that needs about 70 % of the pool."""
    num_tokens = int(POOL * SHARE / KV_BYTES_PER_TOKEN / NUM_REQUESTS)
    return make_burst(
        num_requests=NUM_REQUESTS,
        num_prompt_tokens=num_tokens - NUM_OUTPUT_TOKENS,
        num_output_tokens=NUM_OUTPUT_TOKENS,
        seed="ab".index(name),
    )


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with Pair(tmp_path_factory.mktemp("pair")) as pair:
        for name in "ab":
            pair.begin(name)
        pair.wait_ready()
        yield pair


@pytest.fixture(scope="module")
def answers_alone(pair: Pair) -> dict[str, list[list[int]]]:
    """What each server answers while the other is idle."""
    return {name: tokens_of(pair.burst(name)[name]) for name in "ab"}


def check(answers: dict[str, list[Completion]], expected: dict[str, list[list[int]]]) -> None:
    for name, completions in answers.items():
        assert tokens_of(completions) == expected[name]


def test_bursts_in_turn_peak_at_more_than_the_pool_together(
    pair: Pair, answers_alone: dict[str, list[list[int]]]
) -> None:
    def peaks() -> int:
        return sum(recorder.recording.peak_bytes(name) for name in "ab")

    trim([], directory=pair.directory, wait_seconds=PATIENCE_SECONDS)
    with Recorder(pair.open_ledger) as recorder:
        for _ in range(NUM_ROUNDS):  # on a slow machine requests end before all of them run
            check(pair.burst("a"), answers_alone)
            check(pair.burst("b"), answers_alone)
            if peaks() >= 1.3 * POOL:
                break
    assert peaks() >= 1.3 * POOL
    assert all(view.free_bytes >= 0 for view in recorder.recording.views)
    assert all(
        row.resident_bytes == row.used_bytes + row.cached_bytes + row.idle_bytes
        for view in recorder.recording.views
        for row in view.instances
    )


def test_after_the_last_request_the_kernel_sees_two_pages_at_most(pair: Pair) -> None:
    page_bytes = pair.view("a").page_bytes
    await_that(lambda: pair.view("a").resident_bytes <= 2 * page_bytes)
    assert resident_by_proc(pair["a"]) == pair.view("a").resident_bytes <= 2 * page_bytes


def test_an_idle_servers_cache_makes_room_for_its_neighbour_and_answers_stay_right(
    pair: Pair, answers_alone: dict[str, list[list[int]]]
) -> None:
    check(pair.burst("b"), answers_alone)
    await_that(lambda: pair.view("b").cached_bytes > POOL // 2)
    cached_before = pair.view("b").cached_bytes
    check(pair.burst("a"), answers_alone)
    assert pair.view("b").cached_bytes < cached_before
    assert resident_by_proc(pair["b"]) == pair.view("b").resident_bytes
    check(pair.burst("b"), answers_alone)


def test_trim_empties_an_idle_servers_cache(pair: Pair) -> None:
    page_bytes = pair.view("b").page_bytes
    await_that(lambda: pair.view("b").cached_bytes > 0)
    (result,) = trim(["b"], directory=pair.directory, wait_seconds=PATIENCE_SECONDS)
    assert result.outcome is Outcome.APPLIED
    assert result.after_bytes <= 2 * page_bytes
    assert resident_by_proc(pair["b"]) == result.after_bytes


def test_a_limit_holds_on_an_idle_server_without_a_request(
    pair: Pair, answers_alone: dict[str, list[list[int]]]
) -> None:
    check(pair.burst("b"), answers_alone)
    await_that(lambda: pair.view("b").cached_bytes > POOL // 2)
    refused = set_limit("b", "8MiB", directory=pair.directory)
    assert (refused.outcome, refused.after_bytes) == (Outcome.REFUSED, 0)
    assert "largest request" in refused.reason
    for _ in range(2):
        answer = set_limit("b", "64MiB", directory=pair.directory, wait_seconds=PATIENCE_SECONDS)
        assert answer.outcome is Outcome.APPLIED
    assert resident_by_proc(pair["b"]) == answer.after_bytes <= 64 * MIB
    assert set_limit("b", "none", directory=pair.directory).outcome is Outcome.APPLIED


def test_a_limit_lowered_under_load_is_held_by_preemption_and_nobody_is_lost(
    pair: Pair, answers_alone: dict[str, list[list[int]]]
) -> None:
    async def limit_during_burst() -> list[Completion]:
        sent = asyncio.create_task(pair["a"].send(make("a")))
        while pair.view("a").used_bytes < POOL // 2:
            assert not sent.done()
            await asyncio.sleep(0.02)
        answer = await asyncio.to_thread(
            set_limit, "a", "80MiB", directory=pair.directory, wait_seconds=PATIENCE_SECONDS
        )
        assert answer.outcome is Outcome.APPLIED
        with Recorder(pair.open_ledger) as recorder:
            completions = await sent
        assert recorder.recording.peak_bytes("a") <= 80 * MIB
        return completions

    check({"a": asyncio.run(limit_during_burst())}, answers_alone)
    assert set_limit("a", "none", directory=pair.directory).outcome is Outcome.APPLIED


def test_a_floor_is_freed_of_caches_and_requests_of_both_are_served_beside_it(
    pair: Pair, answers_alone: dict[str, list[list[int]]]
) -> None:
    check(pair.burst("b"), answers_alone)
    assert pair.view("b").resident_bytes > 0.4 * POOL
    answer = set_floor("a", "60%", directory=pair.directory, wait_seconds=PATIENCE_SECONDS)
    assert answer.outcome is Outcome.APPLIED
    assert pair.view("b").resident_bytes <= 0.4 * POOL
    check(pair.burst("b"), answers_alone)  # some of them borrow what the floor's owner leaves
    check(pair.burst("a", "b"), answers_alone)
    assert set_floor("a", "none", directory=pair.directory).outcome is Outcome.APPLIED


def test_a_dry_pool_means_waiting_not_failing(
    pair: Pair, answers_alone: dict[str, list[list[int]]]
) -> None:
    with Recorder(pair.open_ledger) as recorder:
        check(pair.burst("a", "b"), answers_alone)
    least_free = min(view.free_bytes for view in recorder.recording.views)
    assert 0 <= least_free < pair.view("a").page_bytes


def test_killing_one_during_its_burst_frees_its_memory_and_leaves_the_other_alone(
    pair: Pair, answers_alone: dict[str, list[list[int]]]
) -> None:
    trim([], directory=pair.directory, wait_seconds=PATIENCE_SECONDS)

    def is_gone() -> bool:
        return all(view.name != "a" for view in pair.device().instances)

    async def kill_during_bursts() -> tuple[list[Completion], list[Completion]]:
        sends = [asyncio.create_task(pair[name].send(make(name))) for name in "ab"]
        # In a race for the pool nobody is sure of more than what its first request needs.
        while pair.view("a").used_bytes <= 2 * pair.view("a").page_bytes:
            assert not sends[0].done()
            await asyncio.sleep(0.02)
        pair["a"].kill()
        await asyncio.to_thread(await_that, is_gone)
        lost, kept = await asyncio.gather(*sends)
        return lost, kept

    lost, kept = asyncio.run(kill_during_bursts())
    # What was answered before the kill was answered right.
    assert any(completion.error for completion in lost)
    assert all(
        completion.error or completion.token_ids == expected
        for completion, expected in zip(lost, answers_alone["a"], strict=True)
    )
    check({"b": kept}, answers_alone)
    pair.begin("a").wait_ready()
    check(pair.burst("a"), answers_alone)


def test_stopped_servers_leave_no_process_and_no_file(pair: Pair) -> None:
    pair.stop()
    assert list(pair.directory.iterdir()) == []
