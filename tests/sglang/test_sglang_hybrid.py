"""A hybrid, attention and short convolutions by turns, served with the flag and without.

Its states lie in a pool of SGLang's own, beside elastic keys and values. Both servers interpret the
kernels of the convolutions.
"""

from pathlib import Path

import httpx
import pytest
from helpers.sglang_engine import answers, resident_by_proc, short_bursts, twins
from helpers.sglang_models import lfm2, save
from helpers.waiting import await_that

from kvcached_core.control import Outcome, trim
from kvcached_core.units import MIB

pytestmark = [pytest.mark.sglang, pytest.mark.slow, pytest.mark.timeout(400)]

PAGE = 16 * MIB
NUM_STATES = "60"
SETTLE_SECONDS = 10.0


@pytest.mark.parametrize(
    "has_radix_cache",
    [pytest.param(True, marks=pytest.mark.older_release), False],
    ids=["radix", "none"],
)
def test_tokens_of_a_hybrid_are_vanillas_and_its_memory_goes(
    tmp_path: Path, *, has_radix_cache: bool
) -> None:
    model = save(lfm2, tmp_path / "model")
    caching = () if has_radix_cache else ("--disable-radix-cache",)
    arguments = ("--max-mamba-cache-size", NUM_STATES, *caching)
    first, second = short_bursts()[:2]
    with twins(model, tmp_path, *arguments) as servers:
        elastic = servers[0]
        found = [answers(server, [first, second]) for server in servers]
        if has_radix_cache:
            assert resident_by_proc(elastic) > 2 * PAGE
            (trimmed,) = trim([], directory=tmp_path / "kv", wait_seconds=SETTLE_SECONDS)
            assert trimmed.outcome is Outcome.APPLIED
            assert resident_by_proc(elastic) == trimmed.after_bytes
        await_that(lambda: resident_by_proc(elastic) <= 2 * PAGE, SETTLE_SECONDS)
        again = answers(elastic, [first])
        httpx.post(f"{elastic.url}/flush_cache").raise_for_status()
        assert "Mamba Cache is allocated" in elastic.log.read_text()
    assert found[0] == found[1]
    assert again == found[0][: len(again)]
    assert {error for error, _ in found[0]} == {None}
    assert len({tuple(tokens) for _, tokens in found[0]}) == len(found[0])
