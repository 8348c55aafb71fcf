"""Copies of blocks whose layers differ in size, or lie side by side, come back as they were."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from helpers.mixed_models import make_mixed_model
from helpers.offload_runs import rounds_like_vanilla

pytestmark = [
    *(pytest.mark.vllm, pytest.mark.slow, pytest.mark.every_release),
    pytest.mark.skipif(
        find_spec("vllm.v1.kv_cache_layout") is None, reason="these plans are refused before 0.29"
    ),
]

# What the engine gets beside its model, and how many sizes of blocks there are.
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "layers of two sizes": ({"options": {"trust_remote_code": True}}, 2),
    "layers side by side": ({"layout": "BLHNC"}, 1),
}


@pytest.mark.parametrize("name", CASES)
def test_all_chunks_come_back_of_each_size_and_are_read(
    model: Path, tmp_path: Path, name: str
) -> None:
    options, num_sizes = CASES[name]
    if num_sizes > 1:
        model = make_mixed_model(tmp_path / "model", seed=1)
    acts = ["one_by_one", "spoiled_sizes"]
    report = rounds_like_vanilla(tmp_path, model, acts, delay_ms=(0, 5), **options)
    assert report["spoiled"] == [[True, True]] * num_sizes  # what comes back is what is read
