"""Block sizes and layouts of vLLM: the same tokens with us, from both ends of the ids."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from helpers.engines import VANILLA, offline_in, ours, report_of

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.every_release]

# Of addresses alone: the last ids lie behind 2^31 elements of a plane, too.
POOL = "12GiB"
LEAST_PAGE = 600
NUM_LAYERS = 4

SIDE_BY_SIDE: dict[str, dict[str, Any]] = {"layers side by side": {"layout": "BLHNC"}}
CASES: dict[str, dict[str, Any]] = {"blocks of 512 tokens": {"engine": {"block_size": 512}}}
if find_spec("vllm.v1.kv_cache_layout") is not None:
    CASES |= SIDE_BY_SIDE


@pytest.mark.parametrize("name", CASES)
def test_tokens_from_both_ends_of_the_ids(model: Path, tmp_path: Path, name: str) -> None:
    start = offline_in(tmp_path, model)
    environs = (VANILLA, ours(tmp_path, KVCACHED_HOST_POOL=POOL, KVCACHED_DEBUG="1"))
    started = [start(environ, "offline_ends", **CASES[name]) for environ in environs]
    vanilla, elastic = map(report_of, started)
    assert elastic["tokens"] == vanilla["tokens"]
    assert elastic["at_the_top"] == vanilla["tokens"]
    assert len({tuple(tokens) for tokens in vanilla["tokens"]}) > 9  # the answers differ at all
    assert elastic["top_page"] > LEAST_PAGE > min(page for page in elastic["pages"] if page)
    assert elastic["right"] == [elastic["right"][0]] * 2
    assert elastic["wrong"] != elastic["right"][0]  # they are read where we say
    assert elastic["resident"] <= 2 * elastic["page_bytes"]
    ((_, num_planes),) = elastic["classes"]
    assert num_planes == (1 if "layout" in CASES[name] else NUM_LAYERS)
