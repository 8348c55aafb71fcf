"""Full and sliding-window layers, in one pool or in two that share an arena.

SGLang serves Gemma 3 from one pool and Laguna from two, or from one if it is told to. Its other
attention backend for CPUs reads the window's pool at ids of the other one, which is right by chance
as long as both hand out the same; so with two pools both servers interpret the GPU's kernels.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.process_memory import resident_by_proc
from helpers.sglang_engine import (
    Answers,
    Models,
    Vanilla,
    answers,
    elastic_server,
    mixed_bursts,
    short_bursts,
    trims_to,
)
from helpers.sglang_models import (
    SHORT_WINDOW_TOKENS,
    WINDOW_TOKENS,
    gemma,
    laguna,
    small_laguna,
)
from helpers.waiting import await_that

from kvcached_core.units import MIB
from kvcached_demo.harness.load import Burst
from kvcached_demo.harness.server import EngineServer

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

NUM_BURSTS = 2
PAGE = 16 * MIB
NO_RADIX = ("--disable-radix-cache",)
TWO_POOLS = ("--attention-backend", "triton", "--triton-attention-num-kv-splits", "1")


def check(
    server: EngineServer, bursts: list[Burst], expected: Answers, window: int = SHORT_WINDOW_TOKENS
) -> None:
    """Compare with vanilla's answers; some prompt has to be longer than the window."""
    assert max(len(prompt) for burst in bursts for prompt in burst.prompts) > window
    found = answers(server, bursts)
    assert found == expected[: len(found)]


@pytest.mark.every_release
@pytest.mark.parametrize(
    ("make", "arguments"),
    [(gemma, ()), (laguna, ("--disable-hybrid-swa-memory",))],  # the same by a flag
)
def test_tokens_of_a_mix_in_one_pool_are_vanillas(
    tmp_path: Path,
    models: Models,
    vanilla: Vanilla,
    make: Callable[[], Any],
    arguments: tuple[str, ...],
) -> None:
    bursts, flags = mixed_bursts()[:NUM_BURSTS], (*NO_RADIX, *arguments)
    expected = vanilla(models(make), tuple(bursts), *flags)
    with elastic_server(models(make), tmp_path, *flags) as server:
        check(server, bursts, expected, WINDOW_TOKENS)
        assert "swa size" not in server.log.read_text()


@pytest.mark.every_release  # under `make test` the radix cache's, below
def test_tokens_of_a_mix_in_two_pools_are_vanillas_and_its_memory_goes(
    tmp_path: Path, models: Models, vanilla: Vanilla
) -> None:
    model, bursts = models(small_laguna), short_bursts()
    expected = vanilla(model, tuple(bursts[:2]), *NO_RADIX, *TWO_POOLS)
    with elastic_server(model, tmp_path, *NO_RADIX, *TWO_POOLS) as server:
        check(server, bursts[:2], expected)
        await_that(lambda: resident_by_proc(server) <= 2 * PAGE)
        check(server, bursts[:1], expected)
        assert "swa size" in server.log.read_text()


@pytest.mark.older_release
def test_the_radix_cache_of_two_pools_gives_its_memory_when_asked(
    tmp_path: Path, models: Models, vanilla: Vanilla
) -> None:
    model, bursts = models(small_laguna), short_bursts()
    expected = vanilla(model, tuple(bursts[:2]), *TWO_POOLS)
    with elastic_server(model, tmp_path, *TWO_POOLS) as server:
        check(server, bursts[:2], expected)
        assert resident_by_proc(server) > 2 * PAGE
        await_that(lambda: trims_to(server, tmp_path / "kv", 2 * PAGE))
        check(server, bursts[:1], expected)
