"""A real SGLang server gives the same tokens with the flag and without, and idles on two pages."""

import asyncio
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from helpers.sglang_engine import NUM_BURSTS, mixed_bursts, resident_by_proc, start_sglang

from kvcached_core.cli.demo.server import SGLangServer
from kvcached_core.units import MIB

pytestmark = [pytest.mark.sglang, pytest.mark.slow, pytest.mark.timeout(400)]

PAGE = 16 * MIB
RADIX = ()
NO_RADIX = ("--disable-radix-cache",)

# The first server of a run starts as users start it: with processes that SGLang spawns.
starts = itertools.count()


@dataclass
class Twins:
    """The same server with kvcached and without."""

    elastic: SGLangServer
    vanilla: SGLangServer
    has_radix_cache: bool


@pytest.fixture(
    scope="module",
    params=[
        (1, RADIX),
        (1, NO_RADIX),
        (16, RADIX),
        pytest.param((16, NO_RADIX), marks=pytest.mark.older_release),
    ],
    ids=["1-radix", "1-none", "16-radix", "16-none"],
)
def twins(
    request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Twins]:
    block_tokens, caching = request.param
    arguments = ("--page-size", str(block_tokens), *caching)
    workspace = tmp_path_factory.mktemp("sg")
    servers = [
        start_sglang("elastic", model, workspace, *arguments, core=0, cold=next(starts) == 0),
        start_sglang("vanilla", model, workspace, *arguments, elastic=False, core=1),
    ]
    try:
        for server in servers:
            server.wait_ready()
        yield Twins(servers[0], servers[1], not caching)
    finally:
        for server in servers:
            server.kill()


def answers(server: SGLangServer, num_bursts: int = NUM_BURSTS) -> list[list[int]]:
    found = []
    for burst in mixed_bursts()[:num_bursts]:
        completions = asyncio.run(server.send(burst))
        assert [completion.error for completion in completions] == [None] * len(burst.prompts)
        found += [completion.token_ids for completion in completions]
    return found


def test_greedy_tokens_are_vanillas(twins: Twins) -> None:
    assert answers(twins.elastic) == answers(twins.vanilla)


def test_an_idle_server_holds_two_pages_and_its_cache(twins: Twins) -> None:
    if twins.has_radix_cache:
        assert resident_by_proc(twins.elastic) > 2 * PAGE
        httpx.post(f"{twins.elastic.url}/flush_cache").raise_for_status()
    time.sleep(2)  # the bar: two seconds after the last request
    assert 0 < resident_by_proc(twins.elastic) <= 2 * PAGE
    assert answers(twins.elastic, 1) == answers(twins.vanilla, 1)


def test_an_aborted_request_gives_its_memory_back(twins: Twins) -> None:
    async def ask_and_leave() -> None:
        body = {
            "input_ids": list(range(3, 400)),
            "rid": "leaver",
            "sampling_params": {"max_new_tokens": 1500, "ignore_eos": True},
        }
        async with httpx.AsyncClient(base_url=twins.elastic.url, timeout=60) as client:
            asked = asyncio.create_task(client.post("/generate", json=body))
            await asyncio.sleep(0.5)
            (await client.post("/abort_request", json={"rid": "leaver"})).raise_for_status()
            await asked

    asyncio.run(ask_and_leave())
    httpx.post(f"{twins.elastic.url}/flush_cache").raise_for_status()
    time.sleep(2)
    assert resident_by_proc(twins.elastic) <= 2 * PAGE


def test_released_memory_is_mapped_again_by_the_next_request(twins: Twins) -> None:
    before = answers(twins.elastic, 1)
    httpx.post(f"{twins.elastic.url}/release_memory_occupation", json={}).raise_for_status()
    assert resident_by_proc(twins.elastic) == PAGE
    httpx.post(f"{twins.elastic.url}/resume_memory_occupation", json={}).raise_for_status()
    assert answers(twins.elastic, 1) == before


def test_the_leak_checks_stay_on_and_silent(twins: Twins) -> None:
    text = twins.elastic.log.read_text()
    assert twins.elastic.process.poll() is None
    assert "leak detected" not in text
    assert "kvcached: process" in text
    assert "kvcached: process" not in twins.vanilla.log.read_text()
