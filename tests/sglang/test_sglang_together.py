"""Data-parallel ranks that draft and copy to the host at once answer as without us."""

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from helpers.engine_plugin import add_plugin
from helpers.hicache_server import HiCacheServer, hicache_server
from helpers.process_memory import resident_of_ranks
from helpers.sglang_engine import cores_of, post
from helpers.speculating_server import ATTENTION
from helpers.spoiled_planes import TARGET, VARIABLE
from helpers.waiting import PATIENCE_SECONDS, await_that

from kvcached_core.control import trim
from kvcached_core.units import MIB
from kvcached_core.weights.host_budget import HostBudget
from kvcached_core.weights.host_tier import read_tiers

pytestmark = [
    pytest.mark.sglang,
    pytest.mark.slow,
    pytest.mark.every_release,
    pytest.mark.newest_release,  # 0.5.15 has NGRAM on CUDA alone
]

PAGE = 2 * MIB
NUM_RANKS = 2
NUM_ANSWER_TOKENS = 16
NUM_PROMPTS = 3 * NUM_RANKS  # each rank gets every second one
TOGETHER = (
    *("--dp-size", str(NUM_RANKS)),
    *("--speculative-algorithm", "NGRAM", "--speculative-num-draft-tokens", "4"),
    *("--mem-fraction-static", "0.7"),  # others on this machine take memory meanwhile
    *ATTENTION,
)


def prompts() -> list[list[int]]:
    """Return prompts that repeat themselves, so that something can be drafted."""
    source = random.Random(1)
    parts = [[source.randrange(3, 500) for _ in range(50)] for _ in range(NUM_PROMPTS)]
    return [part * 4 for part in parts]


def started(
    model: Path, folder: Path, *, elastic: bool = True
) -> AbstractContextManager[HiCacheServer]:
    folder.mkdir()
    return hicache_server(
        model,
        folder,
        *TOGETHER,
        elastic=elastic,
        KVCACHED_PAGE_BYTES=str(PAGE),
        TORCHDYNAMO_DISABLE="1",
        **cores_of(NUM_RANKS),
        **add_plugin(folder / "plugin", "helpers.spoiled_planes"),
        **{VARIABLE: str(folder / "spoiled")},
    )


def asked(server: HiCacheServer) -> list[list[int]]:
    return [server.ask(prompt, NUM_ANSWER_TOKENS) for prompt in prompts()]


def lose_caches(server: HiCacheServer) -> None:
    def has_lost() -> bool:
        trim([], directory=server.directory, wait_seconds=PATIENCE_SECONDS)
        return resident_of_ranks(server.server) == [PAGE] * NUM_RANKS

    await_that(has_lost)


def hits(server: HiCacheServer) -> list[int]:
    """Return how many tokens each rank has had back from the host."""
    return [view.counts[0].hit_tokens for view in read_tiers(HostBudget(server.config).folder)]


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    with started(model, tmp_path_factory.mktemp("sg") / "v", elastic=False) as server:
        return asked(server)


@pytest.fixture(scope="module")
def served(
    model: Path, expected: object, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[HiCacheServer]:
    del expected  # one server at a time
    with started(model, tmp_path_factory.mktemp("sg") / "e") as server:
        yield server


def test_tokens_are_vanillas_also_where_the_host_gives_them_back(
    served: HiCacheServer, expected: list[list[int]]
) -> None:
    assert asked(served) == expected
    said = [served.answer(prompts()[0])[1] for _ in range(NUM_RANKS)]
    assert min(each["spec_num_proposed_drafts"] for each in said) > 0
    lose_caches(served)
    assert asked(served) == expected
    assert len(hits(served)) == NUM_RANKS
    assert min(hits(served)) > 0


def test_what_is_loaded_and_what_is_read_is_found_out(
    served: HiCacheServer, expected: list[list[int]]
) -> None:
    lose_caches(served)
    with served.loads_spoiled():
        assert asked(served) != expected
    post(f"{served.server.url}/flush_cache")
    spoiled = served.folder.parent / "spoiled"
    spoiled.write_text(TARGET)
    assert asked(served) != expected
    spoiled.unlink()
    post(f"{served.server.url}/flush_cache")
    assert asked(served) == expected
    post(f"{served.server.url}/flush_cache")
    await_that(lambda: max(resident_of_ranks(served.server)) <= 2 * PAGE)
