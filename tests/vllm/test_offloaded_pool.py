"""What a request leaves is named until its copies are made, and its page stays meanwhile."""

from typing import Any

import pytest
from helpers.page_source import CountingSource

from kvcached_core.memory.geometry import Geometry

pytestmark = [pytest.mark.vllm, pytest.mark.older_release]

GEOMETRY = Geometry(block_bytes=1024, num_planes=4, ids_per_page=16, blocks_per_page=4)
NUM_PAGES = 8


def cached_blocks(pool: Any, *, num_pages: int) -> list[Any]:
    """Return the blocks of a request, which the cache has, on so many pages; page 0 is none."""
    from vllm.v1.core.kv_cache_utils import BlockHash, make_block_hash_with_group_id

    blocks: list[Any] = pool.get_new_blocks(3 + 4 * num_pages)[3:]
    for block in blocks:
        name = make_block_hash_with_group_id(BlockHash(block.block_id.to_bytes(16)), 0)
        block.set_block_hash(name)
        pool.cached_block_hash_to_block.insert(name, block)
    return blocks


def end(pool: Any, job_id: int) -> None:
    pool.pages.book.holds.release(job_id)
    pool.copied.end(job_id)


def test_freed_blocks_hold_their_pages_until_the_next_copies_are_made() -> None:
    from kvcached_vllm.offloaded_pool import OffloadedBlockPool

    sizes = NUM_PAGES * GEOMETRY.blocks_per_page, False, 4, False
    source = CountingSource(NUM_PAGES - 1)
    pool = OffloadedBlockPool(GEOMETRY, source, *sizes, options={}, num_host_blocks=1)
    pages, holds = pool.pages, pool.pages.book.holds
    shared, *others = pool.get_new_blocks(8)
    pool.touch([shared])
    pool.free_blocks(iter([*others, shared]))
    assert sorted(pages.freed_ids) == sorted(block.block_id for block in others)
    open_before = pages.num_open_pages
    pages.close_empty(NUM_PAGES)
    assert pages.num_open_pages == open_before > 1
    holds.settle()
    pages.close_empty(NUM_PAGES)
    assert pages.num_open_pages == 1
    pool.free_blocks([shared])
    assert pages.freed_ids == [shared.block_id]


def test_pages_whose_blocks_the_host_has_too_are_given_before_older_ones() -> None:
    from kvcached_vllm.offloaded_pool import OffloadedBlockPool

    sizes = NUM_PAGES * GEOMETRY.blocks_per_page, True, 4, False
    source = CountingSource(NUM_PAGES - 1)
    pool = OffloadedBlockPool(GEOMETRY, source, *sizes, options={}, num_host_blocks=100)
    blocks = cached_blocks(pool, num_pages=3)
    pool.hold([block.block_id for block in blocks[4:8]], 1)
    pool.hold([block.block_id for block in blocks[8:]], 2)
    pool.free_blocks(blocks)
    pool.pages.book.holds.settle()
    end(pool, 1)
    pool.evict_pages(1)
    assert [block.block_hash is None for block in blocks] == [False] * 4 + [True] * 4 + [False] * 4
    end(pool, 2)
    pool.evict_pages(1)
    assert [block.block_hash is None for block in blocks] == [False] * 4 + [True] * 8


def test_pages_of_open_copies_leave_the_cache_last_and_no_more_of_them_than_are_wanted() -> None:
    from kvcached_vllm.offloaded_pool import OffloadedBlockPool

    sizes = NUM_PAGES * GEOMETRY.blocks_per_page, True, 4, False
    source = CountingSource(NUM_PAGES - 1)
    pool = OffloadedBlockPool(GEOMETRY, source, *sizes, options={}, num_host_blocks=100)
    blocks = cached_blocks(pool, num_pages=4)
    pool.hold([blocks[1].block_id, blocks[5].block_id], 1)
    pool.free_blocks(blocks)
    pool.pages.book.holds.settle()
    assert pool.evict_pages(2)
    assert [block.block_hash is None for block in blocks] == [False] * 8 + [True] * 8
    assert pool.pages.close_empty(NUM_PAGES) == 2
    assert pool.evict_pages(1)
    assert [block.block_hash is None for block in blocks[:8]] == [True] * 4 + [False] * 4
    assert not pool.evict_pages(1)  # the one that is empty is enough
    assert pool.evict_pages(2)
