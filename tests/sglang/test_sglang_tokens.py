"""A real SGLang server gives the same tokens with the flag and without, and idles on two pages."""

import asyncio
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from helpers.process_memory import resident_by_proc
from helpers.sglang_engine import (
    NUM_BURSTS,
    Answers,
    Vanilla,
    answers,
    elastic_server,
    mixed_bursts,
    post,
)
from helpers.waiting import PATIENCE_SECONDS, await_that

from kvcached_core.units import MIB
from kvcached_demo.harness.server import EngineServer

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

PAGE = 16 * MIB
RADIX = ()
NO_RADIX = ("--disable-radix-cache",)

# The first server of a run starts as users start it: with processes that SGLang spawns.
starts = itertools.count()


@dataclass
class Served:
    """A server with kvcached, and what one without answers.

    Vanilla is asked once for all: neither its cache nor its block size may change a token.
    """

    elastic: EngineServer
    expected: Answers
    has_radix_cache: bool

    def check(self, num_bursts: int = NUM_BURSTS) -> None:
        """Ask the first bursts and compare."""
        found = answers(self.elastic, mixed_bursts()[:num_bursts])
        assert found == self.expected[: len(found)]


@pytest.fixture(
    scope="module",
    params=[
        (1, RADIX),
        # Blocks of one token, and no radix cache, are each in one of the others.
        pytest.param((1, NO_RADIX), marks=pytest.mark.every_release),
        (16, RADIX),
        # Under `make test` in the older release; in the newest by Gemma and DeepSeek.
        pytest.param((16, NO_RADIX), marks=[pytest.mark.older_release, pytest.mark.every_release]),
    ],
    ids=["1-radix", "1-none", "16-radix", "16-none"],
)
def served(
    request: pytest.FixtureRequest,
    model: Path,
    vanilla: Vanilla,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    block_tokens, caching = request.param
    arguments = ("--page-size", str(block_tokens), *caching)
    expected = vanilla(model, tuple(mixed_bursts()))
    workspace = tmp_path_factory.mktemp("sg")
    with elastic_server(model, workspace, *arguments, cold=next(starts) == 0) as server:
        yield Served(server, expected, not caching)


def test_greedy_tokens_are_vanillas(served: Served) -> None:
    served.check()
    assert len({tuple(tokens) for _, tokens in served.expected}) > 50  # the answers differ at all


def test_an_idle_server_holds_two_pages_and_its_cache(served: Served) -> None:
    if served.has_radix_cache:
        assert resident_by_proc(served.elastic) > 2 * PAGE
        post(f"{served.elastic.url}/flush_cache")
    await_that(lambda: 0 < resident_by_proc(served.elastic) <= 2 * PAGE)
    served.check(1)


def test_an_aborted_request_gives_its_memory_back(served: Served) -> None:
    async def ask_and_leave() -> None:
        body = {
            "input_ids": list(range(3, 400)),
            "rid": "leaver",
            "sampling_params": {"max_new_tokens": 1500, "ignore_eos": True},
        }
        async with httpx.AsyncClient(
            base_url=served.elastic.url, timeout=PATIENCE_SECONDS
        ) as client:
            asked = asyncio.create_task(client.post("/generate", json=body))
            await asyncio.sleep(0.5)
            (await client.post("/abort_request", json={"rid": "leaver"})).raise_for_status()
            await asked

    asyncio.run(ask_and_leave())
    post(f"{served.elastic.url}/flush_cache")
    await_that(lambda: resident_by_proc(served.elastic) <= 2 * PAGE)


def test_released_memory_is_mapped_again_by_the_next_request(served: Served) -> None:
    served.check(1)
    post(f"{served.elastic.url}/release_memory_occupation", {})
    assert resident_by_proc(served.elastic) == PAGE
    post(f"{served.elastic.url}/resume_memory_occupation", {})
    served.check(1)


def test_a_sleeping_server_is_healthy(served: Served) -> None:
    url = served.elastic.url
    post(f"{url}/release_memory_occupation", {})
    codes = [httpx.get(f"{url}/health", timeout=PATIENCE_SECONDS).status_code for _ in range(2)]
    post(f"{url}/resume_memory_occupation", {})
    assert codes == [httpx.codes.OK, httpx.codes.OK]
    served.check(1)


def test_the_leak_checks_stay_on_and_silent(served: Served) -> None:
    assert served.elastic.process.poll() is None
    assert "leak detected" not in served.elastic.log.read_text()
