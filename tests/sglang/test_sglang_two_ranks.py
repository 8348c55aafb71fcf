"""Two ranks, or two stages, a scheduler each, decide alike: same pages, vanilla's tokens."""

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from helpers.process_memory import resident_of_ranks
from helpers.sglang_engine import cores_of, large_burst, mixed_bursts, post, start_sglang
from helpers.waiting import PATIENCE_SECONDS, await_that
from helpers.wrong_block import wrong_block_variables, wrong_blocks

from kvcached_core.control import Outcome, set_limit, trim
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.view import InstanceView
from kvcached_core.units import MIB
from kvcached_demo.harness.engines import SGLANG
from kvcached_demo.harness.load import Burst, Completion
from kvcached_demo.harness.server import EngineServer
from kvcached_demo.harness.servers import Servers

pytestmark = [pytest.mark.sglang, pytest.mark.slow]


@dataclass(frozen=True)
class Form:
    """How two ranks share a model."""

    flag: str
    variables: Mapping[str, str] = field(default_factory=dict)


STAGES = Form("--pp-size")
UNLIKE_STAGES = Form("--pp-size", {"SGLANG_PP_LAYER_PARTITION": "1,3"})
FORMS = [
    pytest.param(Form("--tp-size"), id="ranks"),
    pytest.param(STAGES, id="stages", marks=pytest.mark.every_release),
    pytest.param(UNLIKE_STAGES, id="stages of 1 and 3 layers", marks=pytest.mark.every_release),
]

# Small, so that prompts which fill it are computed soon, and with as many pages as a large one.
POOL = 256 * MIB
PAGE = 8 * MIB
MAX_TOKENS = 1024
BURSTS = [*mixed_bursts()[:2], large_burst(1, POOL)]


@dataclass
class Pair:
    """A server of two ranks on the pool; the answers come from SGLang's two ranks alone."""

    server: EngineServer
    directory: Path
    expected: list[list[list[int]]]

    @property
    def page_bytes(self) -> int:
        """What a page takes of each: whole blocks in all layers, so not quite what was set."""
        return self.view().page_bytes // 2

    def view(self) -> InstanceView:
        with Ledger(self.directory / "host.ledger") as ledger:
            (view,) = ledger.view().instances
            return view


def ask(server: EngineServer, burst: Burst) -> list[list[int]]:
    return check(asyncio.run(server.send(burst)))


def check(completions: list[Completion]) -> list[list[int]]:
    assert [completion.error for completion in completions] == [None] * len(completions)
    return [completion.token_ids for completion in completions]


def start(
    servers: Servers, name: str, model: Path, form: Form, *, elastic: bool = True
) -> EngineServer:
    server = start_sglang(
        servers,
        name,
        model,
        *(form.flag, "2"),
        *SGLANG.longest(MAX_TOKENS),
        elastic=elastic,
        page_bytes=PAGE,
        pool_bytes=POOL,
        variables={
            **cores_of(2),
            **wrong_block_variables(servers.workspace / "plugin"),
            **form.variables,
        },
    )
    server.wait_ready()
    return server


@pytest.fixture(scope="module", params=FORMS)
def pair(
    model: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Pair]:
    workspace = tmp_path_factory.mktemp("sg")
    with Servers(workspace, POOL) as servers:
        server = start(servers, "vanilla", model, request.param, elastic=False)
        expected = [ask(server, burst) for burst in BURSTS]
    with Servers(workspace, POOL) as servers:
        server = start(servers, "elastic", model, request.param)
        yield Pair(server, servers.directory, expected)


def test_tokens_are_vanillas_and_both_ranks_hold_the_same(pair: Pair) -> None:
    assert [ask(pair.server, burst) for burst in BURSTS] == pair.expected

    def is_alike() -> bool:  # a stage is a step behind the one before it
        first, second = resident_of_ranks(pair.server)
        return first == second > 2 * pair.page_bytes

    await_that(is_alike)


def test_a_trim_reaches_both_ranks(pair: Pair) -> None:
    def is_trimmed() -> bool:  # right behind an answer more is in use
        (answer,) = trim([], directory=pair.directory, wait_seconds=PATIENCE_SECONDS)
        assert answer.outcome is Outcome.APPLIED
        return resident_of_ranks(pair.server) == [pair.page_bytes] * 2

    await_that(is_trimmed)
    assert pair.view().resident_bytes == 2 * pair.page_bytes


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
        assert max(resident_of_ranks(pair.server)) <= 0.15 * POOL
        return await load

    assert check(asyncio.run(lower_midway())) == pair.expected[-1]
    assert set_limit("elastic", "none", directory=pair.directory).outcome is Outcome.APPLIED


def test_a_flushed_cache_leaves_two_pages_at_most(pair: Pair) -> None:
    post(f"{pair.server.url}/flush_cache")
    await_that(lambda: max(resident_of_ranks(pair.server)) <= 2 * pair.page_bytes)


def test_a_wrong_block_changes_tokens(pair: Pair) -> None:
    with wrong_blocks(pair.directory.parent / "plugin"):
        assert ask(pair.server, BURSTS[0]) != pair.expected[0]


def test_killing_the_server_gives_the_memory_of_both_back(pair: Pair) -> None:
    pair.server.kill()
    with Ledger(pair.directory / "host.ledger") as ledger:
        await_that(lambda: not ledger.view().instances)
        assert ledger.view().free_bytes == POOL
