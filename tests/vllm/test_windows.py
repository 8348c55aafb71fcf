"""Which layers may stand beside vLLM's connector, and what it forgets with a page."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvcached_core.errors import UnsupportedEngineError
from kvcached_core.memory.geometry import Geometry
from kvcached_vllm.windows import forget_closed, has_windows, refuse_unknown

pytestmark = [pytest.mark.vllm, pytest.mark.older_release]

GEOMETRY = Geometry(block_bytes=1024, num_planes=4, ids_per_page=16, blocks_per_page=4)
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
    full, mixed = plan("FullAttentionSpec"), plan("FullAttentionSpec", kind)
    assert (has_windows(full), has_windows(mixed)) == (False, True)
    refuse_unknown(mixed)


@pytest.mark.parametrize(
    ("kind", "named"), [("CrossAttentionSpec", "a CrossAttentionSpec"), ("MambaSpec", "states")]
)
def test_other_layers_are_refused_by_name_beside_a_connector(kind: str, named: str) -> None:
    with pytest.raises(UnsupportedEngineError, match=rf"{named}.*remove --kv-offloading-size"):
        refuse_unknown(plan("FullAttentionSpec", kind))


@pytest.mark.parametrize(
    ("blocks_per_chunk", "expected"),
    [(1, [3, 0, 0, 48, 0, 50]), (2, [0, 0, 0, 0, 0, 0])],
    ids=["a block is a chunk", "two blocks are"],
)
def test_blocks_of_a_closed_page_are_named_no_more_nor_their_chunks(
    blocks_per_chunk: int, expected: list[int]
) -> None:
    group = SimpleNamespace(block_ids=[3, 16, 19, 48, 33, 50])
    other = SimpleNamespace(block_ids=[0, 51])
    connector = SimpleNamespace(
        config=SimpleNamespace(blocks_per_chunk=blocks_per_chunk),
        _req_status={"request": SimpleNamespace(group_states=(group, other))},
    )
    scheduler = SimpleNamespace(connector=SimpleNamespace(connector_scheduler=connector))
    forget_closed(SimpleNamespace(scheduler=scheduler), GEOMETRY)([1, 2])
    assert group.block_ids == expected
    assert other.block_ids == [0, 51]
