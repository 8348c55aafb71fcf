"""A hybrid, attention and short convolutions by turns, served with the flag and without.

Its states lie in a pool of SGLang's own, beside elastic keys and values. Servers interpret the
kernels of the convolutions.
"""

from pathlib import Path

import pytest
from helpers.process_memory import resident_by_proc
from helpers.sglang_engine import (
    Models,
    Vanilla,
    answers,
    elastic_server,
    post,
    short_bursts,
    trims_to,
)
from helpers.sglang_models import small_lfm2
from helpers.waiting import await_that

from kvcached_core.units import MIB

pytestmark = [pytest.mark.sglang, pytest.mark.slow, pytest.mark.timeout(400)]

PAGE = 2 * MIB
NUM_STATES = "60"
NO_RADIX = ("--disable-radix-cache",)


@pytest.mark.parametrize(
    "has_radix_cache",
    [
        pytest.param(True, marks=pytest.mark.older_release),
        pytest.param(False, marks=pytest.mark.every_release),
    ],
    ids=["radix", "none"],
)
def test_tokens_of_a_hybrid_are_vanillas_and_its_memory_goes(
    tmp_path: Path, models: Models, vanilla: Vanilla, *, has_radix_cache: bool
) -> None:
    model = models(small_lfm2)
    flags = ("--max-mamba-cache-size", NUM_STATES)
    first, second = short_bursts()[:2]
    expected = vanilla(model, (first, second), *flags, *NO_RADIX)
    caching = () if has_radix_cache else NO_RADIX
    with elastic_server(model, tmp_path, *flags, *caching, page_bytes=PAGE) as elastic:
        assert answers(elastic, [first, second]) == expected
        if has_radix_cache:
            assert resident_by_proc(elastic) > 2 * PAGE
            await_that(lambda: trims_to(elastic, tmp_path / "kv", 2 * PAGE))
        await_that(lambda: resident_by_proc(elastic) <= 2 * PAGE)
        again = answers(elastic, [first])
        post(f"{elastic.url}/flush_cache")
        assert "Mamba Cache is allocated" in elastic.log.read_text()
    assert again == expected[: len(again)]
    assert len({tuple(tokens) for _, tokens in expected}) == len(expected)
