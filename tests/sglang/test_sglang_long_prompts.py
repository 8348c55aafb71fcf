"""A long prompt that finds the pool dry halfway waits, gives its part back, and is answered."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.sglang_engine import POOL, start_sglang
from helpers.waiting import PATIENCE_SECONDS

from kvcached_core.ledger.ledger import Ledger
from kvcached_core.units import MIB
from kvcached_demo.harness.load import Burst, Completion
from kvcached_demo.harness.server import EngineServer
from kvcached_demo.harness.servers import Servers

pytestmark = [pytest.mark.sglang, pytest.mark.slow, pytest.mark.every_release]

PAGE = 8 * MIB
BURST = Burst((tuple(range(3, 490)) * 2,), 8)  # four pages


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sg")


@pytest.fixture(scope="module")
def server(model: Path, workspace: Path) -> Iterator[EngineServer]:
    arguments = ("--chunked-prefill-size", "16", "--disable-radix-cache")
    with Servers(workspace, POOL) as servers:
        server = start_sglang(servers, "long", model, *arguments, page_bytes=PAGE)
        server.wait_ready()
        yield server


def resident_bytes(ledger: Ledger) -> int:
    return sum(view.resident_bytes for view in ledger.view().instances)


def test_a_prompt_that_was_begun_gives_its_part_back_and_is_answered_later(
    server: EngineServer, workspace: Path
) -> None:
    async def run() -> tuple[list[Completion], list[Completion]]:
        expected = await server.send(BURST)
        with Ledger(workspace / "kv" / "host.ledger") as ledger:
            row = ledger.register(name="neighbour", engine="test")
            while resident_bytes(ledger) > 2 * PAGE:  # noqa: ASYNC110  another process
                await asyncio.sleep(0.05)
            asked = asyncio.create_task(server.send(BURST))
            while resident_bytes(ledger) < 3 * PAGE:  # noqa: ASYNC110  another process
                await asyncio.sleep(0)  # it has to be caught in the middle of its prompt
            taken = 0
            deadline = time.monotonic() + PATIENCE_SECONDS
            while not asked.done() and taken < POOL - 2 * PAGE:
                taken += ledger.promise(row, POOL, PAGE)  # also what the prompt gives back
                assert time.monotonic() < deadline
                await asyncio.sleep(0.01)
            assert not asked.done()
            ledger.unregister(row)
            return expected, await asked

    expected, found = asyncio.run(run())
    assert [answer.error for answer in found] == [None]
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in expected]
