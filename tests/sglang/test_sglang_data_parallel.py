"""Two data-parallel ranks of one server: an instance each, and vanilla's tokens; nothing stays."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.process_memory import resident_of_ranks
from helpers.sglang_engine import cores_of, large_burst, mixed_bursts, start_sglang
from helpers.sglang_weights import NUM_WEIGHTS, num_weights, start_yielding
from helpers.waiting import PATIENCE_SECONDS, await_that
from helpers.wrong_block import wrong_block_variables, wrong_blocks

from kvcached_core.control import Outcome, sleep
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.view import InstanceView
from kvcached_core.units import MIB
from kvcached_demo.harness.engines import SGLANG
from kvcached_demo.harness.load import Burst, Completion
from kvcached_demo.harness.server import EngineServer
from kvcached_demo.harness.servers import Servers

pytestmark = [
    pytest.mark.sglang,
    pytest.mark.slow,
    pytest.mark.every_release,
]

POOL = 256 * MIB
PAGE = 8 * MIB
MAX_TOKENS = 1024
NAMES = ("elastic", "elastic-dp1")
BURSTS = [*mixed_bursts()[:2], large_burst(1, POOL)]


def start(servers: Servers, name: str, model: Path, *, elastic: bool = True) -> EngineServer:
    server = start_sglang(
        servers,
        name,
        model,
        *("--dp-size", "2"),
        *SGLANG.caching(is_on=False),
        *SGLANG.longest(MAX_TOKENS),
        elastic=elastic,
        page_bytes=PAGE,
        pool_bytes=POOL,
        variables={
            "KVCACHED_DEBUG": "1",
            **cores_of(2),
            **wrong_block_variables(servers.workspace / "plugin"),
        },
    )
    server.wait_ready()
    return server


def ask(server: EngineServer, burst: Burst) -> list[list[int]]:
    return tokens(asyncio.run(server.send(burst)))


def tokens(completions: list[Completion]) -> list[list[int]]:
    assert [completion.error for completion in completions] == [None] * len(completions)
    return [completion.token_ids for completion in completions]


def views(servers: Servers) -> dict[str, InstanceView]:
    with Ledger(servers.directory / "host.ledger") as ledger:
        return {view.name: view for view in ledger.view().instances}


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[list[int]]]:
    """What two ranks of SGLang alone answer."""
    with Servers(tmp_path_factory.mktemp("sg"), POOL) as servers:
        server = start(servers, "vanilla", model, elastic=False)
        return [ask(server, burst) for burst in BURSTS]


@pytest.fixture(scope="module")
def elastic(
    model: Path, expected: object, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Servers]:
    del expected  # one server at a time
    with Servers(tmp_path_factory.mktemp("sg"), POOL) as servers:
        start(servers, "elastic", model)
        yield servers


def test_both_ranks_answer_as_vanilla_and_keep_nothing(
    elastic: Servers, expected: list[list[list[int]]]
) -> None:
    server = elastic["elastic"]

    async def ask_watched() -> list[Completion]:
        load = asyncio.create_task(server.send(BURSTS[-1]))
        while min(view.used_bytes for view in views(elastic).values()) <= PAGE:
            assert not load.done()
            await asyncio.sleep(0.01)
        return await load

    assert set(views(elastic)) == set(NAMES)
    assert [ask(server, burst) for burst in BURSTS[:-1]] == expected[:-1]
    assert tokens(asyncio.run(ask_watched())) == expected[-1]
    await_that(lambda: max(resident_of_ranks(server)) <= 2 * PAGE)
    assert len(resident_of_ranks(server)) == len(NAMES)
    used = {name: view.used_bytes for name, view in views(elastic).items()}
    assert used == dict.fromkeys(NAMES, PAGE)  # the padding slot's


def test_a_wrong_block_changes_tokens(elastic: Servers, expected: list[list[list[int]]]) -> None:
    with wrong_blocks(elastic.workspace / "plugin"):
        assert ask(elastic["elastic"], BURSTS[-1]) != expected[-1]


def test_weights_of_each_rank_go_and_come_without_the_others(
    model: Path, expected: list[list[list[int]]], tmp_path: Path
) -> None:
    def is_asleep(name: str) -> bool:
        slept = sleep(name, directory=servers.directory, wait_seconds=PATIENCE_SECONDS)
        return slept.outcome is Outcome.APPLIED

    with Servers(tmp_path, POOL) as servers:
        arguments = ("--tp-size", "1", "--dp-size", "2", *SGLANG.longest(MAX_TOKENS))
        server = start_yielding(servers, "elastic", model, *arguments, num_ranks=2)
        for asleep in (NAMES, NAMES[1:], NAMES[:1]):
            for name in asleep:
                await_that(lambda name=name: is_asleep(name))
            has_gone = {name: 0 if name in asleep else NUM_WEIGHTS for name in NAMES}
            assert {name: num_weights(servers, name) for name in NAMES} == has_gone
            assert ask(server, BURSTS[0]) == expected[0]
            assert [num_weights(servers, name) for name in NAMES] == [NUM_WEIGHTS] * 2
