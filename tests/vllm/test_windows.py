"""Which layers may stand beside vLLM's connector, and how much of a window a hit loads."""

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvcached_core.errors import UnsupportedEngineError
from kvcached_vllm.windows import hit_blocks, refuse_unknown

pytestmark = [pytest.mark.vllm, pytest.mark.older_release]

SIZES: dict[str, Any] = {"block_size": 16, "num_kv_heads": 1, "head_size": 64}


def plan(*kinds: str) -> Any:
    """Return a plan with a group of layers of each kind."""
    from vllm.v1 import kv_cache_interface

    attention = SIZES | {"dtype": torch.float32}
    options: dict[str, dict[str, Any]] = {
        "FullAttentionSpec": attention,
        "CrossAttentionSpec": attention,
        "SlidingWindowSpec": attention | {"sliding_window": 64},
        "ChunkedLocalAttentionSpec": attention | {"attention_chunk_size": 64},
        "MambaSpec": {"block_size": 16, "shapes": ((2, 2),), "dtypes": (torch.float32,)},
    }
    specs = [getattr(kv_cache_interface, kind)(**options[kind]) for kind in kinds]
    return SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=one) for one in specs])


@pytest.mark.parametrize("kind", ["SlidingWindowSpec", "ChunkedLocalAttentionSpec"])
def test_windows_are_served_beside_a_connector(kind: str) -> None:
    refuse_unknown(plan("FullAttentionSpec", kind))


@pytest.mark.parametrize("kind", ["SlidingWindowSpec", "ChunkedLocalAttentionSpec"])
def test_a_hit_loads_the_blocks_of_a_window(kind: str) -> None:
    assert hit_blocks(plan("FullAttentionSpec")) == {}
    assert hit_blocks(plan("FullAttentionSpec", kind)) == {1: 4}  # 64 tokens of 16 a block


def test_it_may_load_more_where_hits_end_inside_a_chunk_of_another_group() -> None:
    mixed = plan("SlidingWindowSpec", "FullAttentionSpec")
    larger = replace(mixed.kv_cache_groups[1].kv_cache_spec, block_size=64)
    mixed.kv_cache_groups[1].kv_cache_spec = larger
    assert hit_blocks(mixed) == {0: sys.maxsize}


@pytest.mark.parametrize(
    ("kind", "named"), [("CrossAttentionSpec", "a CrossAttentionSpec"), ("MambaSpec", "states")]
)
def test_other_layers_are_refused_by_name_beside_a_connector(kind: str, named: str) -> None:
    with pytest.raises(UnsupportedEngineError, match=rf"{named}.*remove --kv-offloading-size"):
        refuse_unknown(plan("FullAttentionSpec", kind))
