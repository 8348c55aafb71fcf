"""Blocks that HiCache copies to the host come back when the device's memory was given away.

SGLang's tree, controller, host pool, storage and scheduler are its own. Its copies need a GPU; the
ones here are made in a thread, after a delay (`helpers/hicache_copier.py`).
"""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from helpers.hicache_copier_settings import DEFECT, UNMAPPED
from helpers.hicache_race import LimitedRace
from helpers.hicache_server import PAGE, HiCacheServer, ask_all, hicache_server
from helpers.process_memory import resident_by_proc
from helpers.sglang_engine import Vanilla, answers, mixed_bursts, post, random_prompts
from helpers.waiting import await_that

from kvcached_core.units import MIB
from kvcached_demo.harness.load import Burst
from kvcached_demo.harness.model import KV_BYTES_PER_TOKEN

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

NUM_BURSTS = 3
PAGE_TOKENS = PAGE // KV_BYTES_PER_TOKEN
RACE_POOL = 48 * MIB


def bursts() -> list[Burst]:
    return mixed_bursts()[:NUM_BURSTS]


@pytest.fixture(scope="module")
def served(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HiCacheServer]:
    with hicache_server(model, tmp_path_factory.mktemp("tier")) as server:
        yield server


def test_tokens_are_vanillas_and_one_that_loads_other_blocks_is_found_out(
    served: HiCacheServer, model: Path, vanilla: Vanilla
) -> None:
    expected = vanilla(model, tuple(mixed_bursts()))[: 6 * NUM_BURSTS]
    assert answers(served.server, bursts()) == expected
    served.lose_cache()
    loaded = served.counts().hit_tokens
    assert answers(served.server, bursts()) == expected
    assert served.counts().hit_tokens > loaded
    served.lose_cache()
    with served.loads_spoiled():
        assert answers(served.server, bursts()) != expected
    post(f"{served.server.url}/flush_cache")


def test_a_whole_prompt_comes_back_after_its_memory_was_given_away(served: HiCacheServer) -> None:
    # Page 0 never goes, and a prompt that fits on it may not go either.
    (prompt,) = random_prompts(1, 1, PAGE_TOKENS + 100)
    expected = served.ask(prompt)
    rows, before = served.copied()["loaded_rows"], served.counts()
    served.lose_cache()
    found, said = served.answer(prompt)
    assert found == expected
    num_found = len(prompt) - 1  # the last one is computed
    assert said["cached_tokens"] == num_found
    await_that(lambda: served.counts().num_hits == before.num_hits + 1)
    counts = served.counts()
    assert counts.hit_tokens == before.hit_tokens + num_found
    assert served.copied()["loaded_rows"] == rows + num_found
    assert 0 < counts.loaded_bytes <= counts.stored_bytes * 3
    assert counts.held_bytes > 0


def test_memory_is_given_behind_open_copies_and_no_request_stops_for_it(
    served: HiCacheServer,
) -> None:
    asked = random_prompts(2, 6, 300)
    (expected, *_) = asyncio.run(ask_all(served.server.url, asked, 8))
    served.lose_cache()
    running, more = random_prompts(3, 1, 300)[0], random_prompts(4, 12, 300)
    with served.running(running, 3 * PAGE_TOKENS) as said:
        with served.copies_left_open():
            asyncio.run(ask_all(served.server.url, more, 8))
            await_that(lambda: served.view().cached_bytes >= 6 * PAGE)
            before = resident_by_proc(served.server)
            with ThreadPoolExecutor(1) as pool:
                trimming = pool.submit(served.trim)
                with pytest.raises(TimeoutError):  # it is asked until the copies have ended
                    trimming.result(0.5)
                assert resident_by_proc(served.server) > before - 2 * PAGE
                served.gate.unlink()
                trimming.result()
        await_that(lambda: resident_by_proc(served.server) <= before - 4 * PAGE)
    assert said["finish_reason"]["type"] == "abort"  # it ran until now
    assert said["num_retractions"] == 0
    assert served.ask(asked[0]) == expected


def test_a_flush_waits_for_open_copies_and_forgets_the_tier(served: HiCacheServer) -> None:
    (prompt,) = random_prompts(5, 1, 300)
    with served.copies_left_open():
        expected = served.ask(prompt)
        post(f"{served.server.url}/flush_cache")
    await_that(lambda: resident_by_proc(served.server) <= 2 * PAGE)
    found, said = served.answer(prompt)
    assert found == expected
    assert said["cached_tokens"] == 0


def test_a_sleep_waits_for_open_copies_and_leaves_page_0(served: HiCacheServer) -> None:
    (prompt,) = random_prompts(6, 1, 300)
    url = served.server.url
    with served.copies_left_open():
        expected = served.ask(prompt)
        post(f"{url}/release_memory_occupation", {})
    assert resident_by_proc(served.server) == PAGE
    post(f"{url}/resume_memory_occupation", {})
    assert served.ask(prompt) == expected


def race(model: Path, folder: Path, *, seed: int, num_requests: int, policy: str) -> LimitedRace:
    with hicache_server(
        model,
        folder,
        *("--hicache-write-policy", policy, "--context-length", "512"),
        pool_bytes=RACE_POOL,
        delay_ms=(0, 50),
        seed=seed,
        KVCACHED_PAGE_BYTES=str(2 * MIB),
    ) as server:
        run = LimitedRace(server, RACE_POOL, seed)
        asyncio.run(run.run(num_requests))
        copied = server.copied()
        assert min(copied["num_stores"], copied["num_loads"]) > 0
        assert min(run.counts.values()) > 0, run.counts
        run.check_again()
        post(f"{server.server.url}/flush_cache")
        await_that(lambda: resident_by_proc(server.server) <= 4 * MIB)
    return run


@pytest.mark.every_release
def test_no_copy_meets_a_page_that_was_given_away(model: Path, tmp_path: Path) -> None:
    race(model, tmp_path, seed=0, num_requests=80, policy="write_through")


@pytest.mark.every_release
@pytest.mark.parametrize("seed", range(1, 6))
def test_none_does_in_a_long_race(model: Path, tmp_path: Path, seed: int) -> None:
    policy = ("write_through", "write_back", "write_through_selective")[seed % 3]
    run = race(model, tmp_path, seed=seed, num_requests=500, policy=policy)
    assert run.num_stopped > 0


@pytest.mark.every_release
def test_the_race_is_lost_where_what_is_loaded_into_is_mapped_later(
    model: Path, tmp_path: Path
) -> None:
    def load_once() -> None:
        with hicache_server(model, tmp_path, **{DEFECT: UNMAPPED}) as server:
            (prompt,) = random_prompts(1, 1, PAGE_TOKENS + 100)  # what page 0 has never goes
            server.ask(prompt)
            server.lose_cache()
            server.ask(prompt)

    with pytest.raises((AssertionError, httpx.HTTPError)):
        load_once()


@pytest.mark.every_release
def test_blocks_on_disk_outlive_the_engine(model: Path, tmp_path: Path) -> None:
    disk = {"SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR": str(tmp_path / "disk")}
    file = ("--hicache-storage-backend", "file", "--page-size", "16")
    # Else SGLang stops reading as soon as the request could run, and nothing else runs here.
    file += ("--hicache-storage-prefetch-policy", "wait_complete")
    (prompt,) = random_prompts(7, 1, 400)
    found = []
    for number in range(2):
        with hicache_server(model, tmp_path / str(number), *file, **disk) as server:
            found.append(server.answer(prompt))
            await_that(lambda: len(list((tmp_path / "disk").rglob("*.bin"))) > 20)
            server.lose_cache()
    (first, said_first), (again, said_again) = found
    assert first == again
    assert said_first["cached_tokens"] == 0
    assert said_again["cached_tokens"] >= 256


@pytest.mark.every_release
def test_two_ranks_let_go_alike(model: Path, tmp_path: Path) -> None:
    asked = random_prompts(8, 6, PAGE_TOKENS)  # a page has twice as many where each rank has a half
    with hicache_server(model, tmp_path, num_ranks=2) as server:
        expected = asyncio.run(ask_all(server.server.url, asked, 8))
        server.lose_cache()
        assert asyncio.run(ask_all(server.server.url, asked, 8)) == expected
        assert server.counts().hit_tokens > 0
