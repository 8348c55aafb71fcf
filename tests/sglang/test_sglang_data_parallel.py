"""Two data-parallel ranks of one server: an instance each, and vanilla's tokens; nothing stays.

Ranks of data-parallel attention compute each step together: one with nothing to do comes, too.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers.answered import ask, ask_meanwhile, set_and_reached
from helpers.engine_plugin import add_plugin
from helpers.process_memory import resident_of_ranks
from helpers.sglang_engine import Models
from helpers.sglang_models import qwen3_moe
from helpers.sglang_two import BURSTS, MAX_TOKENS, PAGE, POOL, start_two
from helpers.sglang_weights import NUM_WEIGHTS, num_weights, start_yielding
from helpers.speculating_server import ATTENTION
from helpers.spoiled_planes import VARIABLE
from helpers.waiting import PATIENCE_SECONDS, await_that
from helpers.wrong_block import wrong_blocks

from kvcached_core.control import Outcome, sleep
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.view import InstanceView
from kvcached_demo.harness.engines import SGLANG
from kvcached_demo.harness.server import EngineServer
from kvcached_demo.harness.servers import Servers

pytestmark = [
    pytest.mark.sglang,
    pytest.mark.slow,
    pytest.mark.every_release,
    pytest.mark.newest_release,  # 0.5.15 knows no cores of such ranks, and no --attn-dp-size
    pytest.mark.timeout(600),
]

NAMES = ("elastic", "elastic-dp1")


@dataclass(frozen=True)
class Form:
    """How two ranks share a model that is in a folder."""

    model: Path
    arguments: tuple[str, ...]
    plugins: tuple[str, ...] = ()


def start(servers: Servers, name: str, form: Form, *, elastic: bool = True) -> EngineServer:
    variables = {VARIABLE: str(servers.workspace / "spoiled"), "KVCACHED_DEBUG": "1"}
    for plugin in form.plugins:
        variables |= add_plugin(servers.workspace / "plugin", plugin)
    words = (*form.arguments, *SGLANG.caching(is_on=False))
    return start_two(servers, name, form.model, *words, elastic=elastic, **variables)


def views(servers: Servers) -> dict[str, InstanceView]:
    with Ledger(servers.directory / "host.ledger") as ledger:
        return {view.name: view for view in ledger.view().instances}


@pytest.fixture(scope="module", params=["ranks", "attention"])
def form(model: Path, models: Models, request: pytest.FixtureRequest) -> Form:
    if request.param == "ranks":
        return Form(model, ("--dp-size", "2"))
    arguments = ("--tp-size", "2", "--attn-dp-size", "2", *ATTENTION)
    return Form(models(qwen3_moe), arguments, ("helpers.spoiled_planes",))


@pytest.fixture(scope="module")
def expected(form: Form, tmp_path_factory: pytest.TempPathFactory) -> list[list[list[int]]]:
    """What two ranks of SGLang alone answer."""
    with Servers(tmp_path_factory.mktemp("sg"), POOL) as servers:
        server = start(servers, "vanilla", form, elastic=False)
        return [ask(server, burst) for burst in BURSTS]


@pytest.fixture(scope="module")
def elastic(
    form: Form, expected: object, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Servers]:
    del expected  # one server at a time
    with Servers(tmp_path_factory.mktemp("sg"), POOL) as servers:
        start(servers, "elastic", form)
        yield servers


def test_both_ranks_answer_as_vanilla_and_keep_nothing(
    elastic: Servers, expected: list[list[list[int]]]
) -> None:
    server = elastic["elastic"]

    def do_both_work() -> bool:
        return min(view.used_bytes for view in views(elastic).values()) > PAGE

    assert set(views(elastic)) == set(NAMES)
    assert [ask(server, burst) for burst in BURSTS[:-1]] == expected[:-1]
    assert ask_meanwhile(server, BURSTS[-1], do_both_work) == expected[-1]
    await_that(lambda: max(resident_of_ranks(server)) <= 2 * PAGE)
    assert len(resident_of_ranks(server)) == len(NAMES)
    used = {name: view.used_bytes for name, view in views(elastic).items()}
    assert used == dict.fromkeys(NAMES, PAGE)  # the padding slot's


def test_a_limit_lowered_under_load_stops_requests_of_one_rank_alone(
    elastic: Servers, expected: list[list[list[int]]]
) -> None:
    server = elastic["elastic"]

    def lower() -> None:
        set_and_reached(NAMES[0], "20%", elastic.directory)
        assert resident_of_ranks(server)[0] <= 0.2 * POOL

    def is_midway() -> bool:
        return min(view.used_bytes for view in views(elastic).values()) >= POOL * 0.25

    assert ask_meanwhile(server, BURSTS[-1], is_midway, lower) == expected[-1]
    set_and_reached(NAMES[0], "none", elastic.directory)


def test_a_wrong_block_changes_tokens(elastic: Servers, expected: list[list[list[int]]]) -> None:
    with wrong_blocks(elastic.workspace / "plugin"):
        assert ask(elastic["elastic"], BURSTS[-1]) != expected[-1]


def test_weights_of_each_rank_go_and_come_without_the_others(
    form: Form, expected: list[list[list[int]]], tmp_path: Path
) -> None:
    if form.plugins:
        pytest.skip("their weights stay: they compute each step together")

    def is_asleep(name: str) -> bool:
        slept = sleep(name, directory=servers.directory, wait_seconds=PATIENCE_SECONDS)
        return slept.outcome is Outcome.APPLIED

    with Servers(tmp_path, POOL) as servers:
        arguments = ("--tp-size", "1", "--dp-size", "2", *SGLANG.longest(MAX_TOKENS))
        server = start_yielding(servers, "elastic", form.model, *arguments, num_ranks=2)
        for asleep in (NAMES, NAMES[1:], NAMES[:1]):
            for name in asleep:
                await_that(lambda name=name: is_asleep(name))
            has_gone = {name: 0 if name in asleep else NUM_WEIGHTS for name in NAMES}
            assert {name: num_weights(servers, name) for name in NAMES} == has_gone
            assert ask(server, BURSTS[0]) == expected[0]
            assert [num_weights(servers, name) for name in NAMES] == [NUM_WEIGHTS] * 2
