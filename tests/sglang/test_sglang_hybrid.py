"""A hybrid, attention and short convolutions by turns, served with the flag and without.

Its states lie in pages beside those of keys and values, or in a pool of SGLang's own. Servers
interpret the kernels of the convolutions.
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
FIXED = ("--max-mamba-cache-size", "60")
NO_RADIX = ("--disable-radix-cache",)


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
