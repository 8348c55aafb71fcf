"""Two ranks, or two stages, a scheduler each, decide alike: same pages, vanilla's tokens."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from helpers.answered import ask, ask_meanwhile, set_and_reached
from helpers.process_memory import resident_of_ranks
from helpers.sglang_engine import post
from helpers.sglang_two import BURSTS, POOL, start_two
from helpers.waiting import PATIENCE_SECONDS, await_that
from helpers.wrong_block import wrong_blocks

from kvcached_core.control import Outcome, trim
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.view import InstanceView
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
# SGLang 0.5.15 alone counts cores of stages otherwise: it ends at once where both are told theirs.
OF_STAGES = (pytest.mark.every_release, pytest.mark.newest_release)
FORMS = [
    pytest.param(Form("--tp-size"), id="ranks"),
    pytest.param(STAGES, id="stages", marks=OF_STAGES),
    pytest.param(UNLIKE_STAGES, id="stages of 1 and 3 layers", marks=OF_STAGES),
]


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


def start(
    servers: Servers, name: str, model: Path, form: Form, *, elastic: bool = True
) -> EngineServer:
    return start_two(servers, name, model, form.flag, "2", elastic=elastic, **form.variables)


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
    def lower() -> None:
        set_and_reached("elastic", "30%", pair.directory)
        assert max(resident_of_ranks(pair.server)) <= 0.15 * POOL

    def is_midway() -> bool:
        return pair.view().used_bytes >= POOL // 3

    assert ask_meanwhile(pair.server, BURSTS[-1], is_midway, lower) == pair.expected[-1]
    set_and_reached("elastic", "none", pair.directory)


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
