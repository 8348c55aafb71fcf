"""Two tensor-parallel ranks, a scheduler each, decide alike: same pages, vanilla's tokens."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers.process_memory import resident_of_ranks
from helpers.sglang_engine import large_burst, mixed_bursts, start_sglang
from helpers.waiting import PATIENCE_SECONDS, await_that

from kvcached_core.control import Outcome, set_limit, trim
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.view import InstanceView
from kvcached_core.units import MIB
from kvcached_demo.harness.engines import SGLANG
from kvcached_demo.harness.load import Burst, Completion
from kvcached_demo.harness.server import EngineServer
from kvcached_demo.harness.servers import Servers

pytestmark = [pytest.mark.sglang, pytest.mark.slow, pytest.mark.timeout(400)]

# Small, so that prompts which fill it are computed soon, and with as many pages as a large one.
POOL = 256 * MIB
PAGE = 8 * MIB
MAX_TOKENS = 1024
BURSTS = [*mixed_bursts()[:2], large_burst(1, POOL)]


@dataclass
class Pair:
    """A server of two ranks on the pool; the answers come from vanilla SGLang's two ranks."""

    server: EngineServer
    directory: Path
    expected: list[list[list[int]]]

    def view(self) -> InstanceView:
        with Ledger(self.directory / "host.ledger") as ledger:
            (view,) = ledger.view().instances
            return view


def ask(server: EngineServer, burst: Burst) -> list[list[int]]:
    return check(asyncio.run(server.send(burst)))


def check(completions: list[Completion]) -> list[list[int]]:
    assert [completion.error for completion in completions] == [None] * len(completions)
    return [completion.token_ids for completion in completions]


def start(servers: Servers, name: str, model: Path, *, elastic: bool = True) -> EngineServer:
    server = start_sglang(
        servers,
        name,
        model,
        *SGLANG.longest(MAX_TOKENS),
        elastic=elastic,
        num_ranks=2,
        page_bytes=PAGE,
        pool_bytes=POOL,
    )
    server.wait_ready()
    return server


@pytest.fixture(scope="module")
def pair(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    workspace = tmp_path_factory.mktemp("sg")
    with Servers(workspace, POOL) as servers:
        server = start(servers, "vanilla", model, elastic=False)
        expected = [ask(server, burst) for burst in BURSTS]
    with Servers(workspace, POOL) as servers:
        server = start(servers, "elastic", model)
        yield Pair(server, servers.directory, expected)


def test_tokens_are_vanillas_and_both_ranks_hold_the_same(pair: Pair) -> None:
    assert [ask(pair.server, burst) for burst in BURSTS] == pair.expected
    first, second = resident_of_ranks(pair.server)
    assert first == second > 2 * PAGE


def test_a_trim_reaches_both_ranks(pair: Pair) -> None:
    def is_trimmed() -> bool:  # right behind an answer more is in use
        (answer,) = trim([], directory=pair.directory, wait_seconds=PATIENCE_SECONDS)
        assert answer.outcome is Outcome.APPLIED
        return resident_of_ranks(pair.server) == [PAGE, PAGE]

    await_that(is_trimmed)
    assert pair.view().resident_bytes == 2 * PAGE


def test_a_limit_lowered_under_load_stops_the_same_requests_on_both(pair: Pair) -> None:
    async def lower_midway() -> list[Completion]:
        load = asyncio.create_task(pair.server.send(BURSTS[-1]))
        while pair.view().used_bytes < POOL // 3:
            assert not load.done()
            await asyncio.sleep(0.01)
        answer = await asyncio.to_thread(
            set_limit, "elastic", "30%", directory=pair.directory, wait_seconds=PATIENCE_SECONDS
        )
        assert answer.outcome is Outcome.APPLIED
        first, second = resident_of_ranks(pair.server)
        assert first == second <= 0.15 * POOL
        return await load

    assert check(asyncio.run(lower_midway())) == pair.expected[-1]
    assert set_limit("elastic", "none", directory=pair.directory).outcome is Outcome.APPLIED


def test_killing_the_server_gives_the_memory_of_both_back(pair: Pair) -> None:
    pair.server.kill()
    with Ledger(pair.directory / "host.ledger") as ledger:
        await_that(lambda: not ledger.view().instances)
        assert ledger.view().free_bytes == POOL
