"""An engine's blocks by their sparse ids."""

from types import SimpleNamespace
from typing import Any

import pytest

from kvcached_core.engine.sparse_blocks import SparseBlocks
from kvcached_core.memory.geometry import Geometry

GEOMETRY = Geometry(block_bytes=1024, num_planes=4, ids_per_page=16, blocks_per_page=3)


def make(num_blocks: int) -> SparseBlocks[Any]:
    return SparseBlocks([SimpleNamespace(block_id=index) for index in range(num_blocks)], GEOMETRY)


def test_blocks_have_the_sparse_ids_of_their_pages_and_are_found_by_them() -> None:
    blocks = make(6)
    assert [block.block_id for block in blocks] == [0, 1, 2, 16, 17, 18]
    assert all(blocks[block.block_id] is block for block in blocks)
    assert [block.block_id for block in blocks.on_page(1)] == [16, 17, 18]


def test_blocks_that_fill_no_whole_page_are_left_out() -> None:
    blocks = make(8)
    assert blocks.num_pages == 2
    assert len(list(blocks)) == 6
    assert len(blocks) == 19  # as long as the id space


@pytest.mark.parametrize("block_id", [-1, 3, 15, 19, 32])
def test_an_id_that_does_not_exist_is_refused(block_id: int) -> None:
    with pytest.raises(IndexError):
        make(6)[block_id]
