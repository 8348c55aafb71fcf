"""A hybrid, attention and short convolutions by turns, served with the flag and without.

Its states lie in pages beside those of keys and values, or in a pool of SGLang's own. Servers
interpret the kernels of the convolutions.
"""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers.hicache_server import body_of
from helpers.house import Neighbour
from helpers.process_memory import resident_by_proc
from helpers.sglang_engine import (
    READY_SECONDS,
    Models,
    Vanilla,
    answers,
    elastic_server,
    post,
    short_bursts,
    start_sglang,
    trims_to,
)
from helpers.sglang_models import small_lfm2
from helpers.waiting import PATIENCE_SECONDS, await_that

from kvcached_core.config import read_config
from kvcached_core.units import MIB
from kvcached_demo.harness.server import EngineServer
from kvcached_demo.harness.servers import Servers

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

PAGE = 2 * MIB
FIXED = ("--max-mamba-cache-size", "60")
NO_RADIX = ("--disable-radix-cache",)
SMALL_POOL = 64 * MIB
NUM_PAGES = SMALL_POOL // PAGE


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param((), marks=pytest.mark.older_release, id="radix"),
        pytest.param(NO_RADIX, marks=pytest.mark.every_release, id="none"),
        pytest.param(FIXED, marks=pytest.mark.every_release, id="fixed-radix"),
        pytest.param((*FIXED, *NO_RADIX), marks=pytest.mark.every_release, id="fixed-none"),
    ],
)
def test_tokens_of_a_hybrid_are_vanillas_and_its_memory_goes(
    tmp_path: Path, models: Models, vanilla: Vanilla, flags: tuple[str, ...]
) -> None:
    model = models(small_lfm2)
    first, second = short_bursts()[:2]
    expected = vanilla(model, (first, second), *FIXED, *NO_RADIX)
    with elastic_server(model, tmp_path, *flags, page_bytes=PAGE) as elastic:
        assert answers(elastic, [first, second]) == expected
        if "--disable-radix-cache" not in flags:
            assert resident_by_proc(elastic) > 2 * PAGE
            await_that(lambda: trims_to(elastic, tmp_path / "kv", 2 * PAGE))
        await_that(lambda: resident_by_proc(elastic) <= 2 * PAGE)
        again = answers(elastic, [first])
        post(f"{elastic.url}/flush_cache")
        assert "Mamba Cache is allocated" in elastic.log.read_text()
    assert again == expected[: len(again)]
    assert len({tuple(tokens) for _, tokens in expected}) == len(expected)


@dataclass
class Hybrid:
    """A server of a hybrid whose states are elastic, and a neighbour that takes as a test says."""

    server: EngineServer
    servers: Servers
    neighbour: Neighbour

    async def ask(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[Any]:
        """Ask all at once, and return what SGLang answers."""
        async with httpx.AsyncClient(base_url=self.server.url, timeout=PATIENCE_SECONDS) as client:
            asked = [client.post("/generate", json=body_of(one, num_tokens)) for one in prompts]
            return [answer.json() for answer in await asyncio.gather(*asked)]

    def tokens(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
        """Return the tokens of all answers."""
        return tokens_of(asyncio.run(self.ask(prompts, num_tokens)))

    def takes_all_but(self, num_bytes: int) -> bool:
        """Have the neighbour take what it gets; return whether the server has so much at most."""
        self.neighbour.take(NUM_PAGES)
        return resident_by_proc(self.server) <= num_bytes

    def take_back(self) -> None:
        """Have the neighbour give all that it took."""
        num_pages = self.neighbour.view().used_bytes // PAGE
        self.neighbour.rest(num_pages)
        self.neighbour.give(num_pages)


@pytest.fixture(scope="module")
def hybrid(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hybrid]:
    with Servers(tmp_path_factory.mktemp("hybrid"), SMALL_POOL) as servers:
        server = start_sglang(
            servers,
            "hybrid",
            models(small_lfm2),
            page_bytes=PAGE,
            pool_bytes=SMALL_POOL,
            variables={"KVCACHED_DEBUG": "1"},
        )
        server.wait_ready(READY_SECONDS)
        names = {"DIR": servers.directory, "HOST_POOL": SMALL_POOL, "NAME": "neighbour"}
        settings = {f"KVCACHED_{name}": str(value) for name, value in names.items()}
        neighbour = Neighbour(read_config(settings))
        yield Hybrid(server, servers, neighbour)
        neighbour.close()
        log = server.log.read_text()
        assert server.process.poll() is None, log[-4000:]
    assert "kvcached: process" in log
    assert "leak detected" not in log


def tokens_of(answers: list[Any]) -> list[list[int]]:
    assert {one["meta_info"]["finish_reason"]["type"] for one in answers} == {"length"}
    return [one["output_ids"] for one in answers]


def prompts() -> list[tuple[int, ...]]:
    return [prompt for burst in short_bursts()[:2] for prompt in burst.prompts]


@pytest.mark.every_release
def test_cached_states_go_to_a_neighbour_and_answers_stay(hybrid: Hybrid) -> None:
    expected = hybrid.tokens(prompts(), 8)
    assert resident_by_proc(hybrid.server) > 2 * PAGE
    num_free = hybrid.neighbour.take(NUM_PAGES)
    await_that(lambda: hybrid.takes_all_but(2 * PAGE))
    hybrid.neighbour.take(NUM_PAGES)
    assert hybrid.neighbour.view().used_bytes > num_free * PAGE
    hybrid.take_back()
    assert hybrid.tokens(prompts(), 8) == expected
