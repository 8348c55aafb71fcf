"""Full and sliding-window layers, in one pool or in two that share an arena.

SGLang serves Gemma 3 from one pool and Laguna from two, or from one if it is told to. Its other
attention backend for CPUs reads the window's pool at ids of the other one, which is right by chance
as long as both hand out the same; so with two pools both servers interpret the GPU's kernels.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from helpers.sglang_engine import (
    answers,
    mixed_bursts,
    resident_by_proc,
    short_bursts,
    twins,
)
from helpers.sglang_models import WINDOW_TOKENS, gemma, laguna, save, small_laguna
from helpers.waiting import await_that

from kvcached_core.cli.demo.load import Burst
from kvcached_core.cli.demo.server import SGLangServer
from kvcached_core.control import Outcome, trim
from kvcached_core.units import MIB

pytestmark = [pytest.mark.sglang, pytest.mark.slow, pytest.mark.timeout(400)]

NUM_BURSTS = 4
PAGE = 16 * MIB
SETTLE_SECONDS = 10.0
NO_RADIX = ("--disable-radix-cache",)
TWO_POOLS = ("--attention-backend", "triton")


def check(servers: tuple[SGLangServer, SGLangServer], bursts: list[Burst]) -> None:
    """Compare what both answer; some prompt has to be longer than the window."""
    assert max(len(prompt) for burst in bursts for prompt in burst.prompts) > WINDOW_TOKENS
    with ThreadPoolExecutor() as pool:  # each has a core of its own
        found = list(pool.map(partial(answers, bursts=bursts), servers))
    assert found[0] == found[1]
    assert {error for error, _ in found[0]} == {None}


@pytest.mark.parametrize(
    ("make", "arguments"), [(gemma, ()), (laguna, ("--disable-hybrid-swa-memory",))]
)
def test_tokens_of_a_mix_in_one_pool_are_vanillas(
    tmp_path: Path, make: Callable[[], Any], arguments: tuple[str, ...]
) -> None:
    with twins(save(make, tmp_path / "model"), tmp_path, *NO_RADIX, *arguments) as servers:
        check(servers, mixed_bursts()[:NUM_BURSTS])
        assert "swa size" not in servers[0].log.read_text()


def test_tokens_of_a_mix_in_two_pools_are_vanillas_and_its_memory_goes(tmp_path: Path) -> None:
    with twins(save(small_laguna, tmp_path / "model"), tmp_path, *NO_RADIX, *TWO_POOLS) as servers:
        check(servers, short_bursts()[:2])
        await_that(lambda: resident_by_proc(servers[0]) <= 2 * PAGE, SETTLE_SECONDS)
        check(servers, short_bursts()[2:3])
        assert "swa size" in servers[0].log.read_text()


@pytest.mark.older_release
def test_the_radix_cache_of_two_pools_gives_its_memory_when_asked(tmp_path: Path) -> None:
    with twins(save(small_laguna, tmp_path / "model"), tmp_path, *TWO_POOLS) as servers:
        check(servers, short_bursts()[:2])
        assert resident_by_proc(servers[0]) > 2 * PAGE
        (trimmed,) = trim([], directory=tmp_path / "kv", wait_seconds=SETTLE_SECONDS)
        assert trimmed.outcome is Outcome.APPLIED
        assert resident_by_proc(servers[0]) == trimmed.after_bytes <= 2 * PAGE
        check(servers, short_bursts()[:1])
