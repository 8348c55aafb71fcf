"""Blocks that a window has left behind, and what vLLM's connector may still store of them.

A layer that keeps only the last tokens gives blocks back while their request runs. vLLM goes on to
name them, and stores them where its tier had no room before, or where the end of a request makes
them worth storing. A block may hold another request's tokens by then, or its page may be gone.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from itertools import chain
from typing import Any

from kvcached_core.memory.geometry import Geometry

NULL_BLOCK = 0  # what vLLM's connector takes for a block that is not to be stored

# While vLLM schedules an engine that has such layers and a connector.
left_behind: ContextVar["LeftBehind | None"] = ContextVar("kvcached_left_behind", default=None)


class LeftBehind:
    """Makes vLLM's connector forget blocks of windows that it must not store.

    Args:
        core: The engine core.
        geometry: How blocks lie in pages.
        hit_blocks: See `windows.hit_blocks`.
    """

    def __init__(self, core: Any, geometry: Geometry, hit_blocks: Mapping[int, int]) -> None:
        self._core = core
        self._ids_per_page, self._page_blocks = geometry.ids_per_page, geometry.blocks_per_page
        self._hit_blocks = hit_blocks

    def forget_pages(self, pages: Sequence[int]) -> None:
        """Forget the blocks of closed pages."""
        first_ids = (page * self._ids_per_page for page in pages)
        gone = {first + number for first in first_ids for number in range(self._page_blocks)}
        for request in self._connector._req_status.values():
            for group in request.group_states:
                _forget(group.block_ids, gone)

    def forget_left(self, request_id: str, own_ids: Sequence[Sequence[int]]) -> None:
        """Forget what a request that ends has left behind, of what vLLM has passed over.

        vLLM looks at that once more, and has not watched who got it.

        Args:
            request_id: The request.
            own_ids: The blocks that it still has, by group and place.
        """
        connector = self._connector
        chunk_blocks: int = connector.config.blocks_per_chunk
        for number, group in self._windows(connector, request_id):
            ids: list[int] = group.block_ids
            own = own_ids[number]
            num_passed = min(group.next_stored_chunk_idx * chunk_blocks, len(ids), len(own))
            ids[:num_passed] = [
                each if each == other else NULL_BLOCK
                for each, other in zip(ids[:num_passed], own[:num_passed], strict=True)
            ]

    def before_stores(self, connector: Any, output: Any) -> None:
        """Forget what this step's stores would take from others, or store in part.

        Args:
            connector: The scheduler's half of the connector, which is about to make store jobs.
            output: What was scheduled.
        """
        chunk_blocks: int = connector.config.blocks_per_chunk
        ended = output.finished_req_ids or ()
        named = chain(output.num_scheduled_tokens, ended) if chunk_blocks > 1 else ended
        for request_id in named:
            for number, group in self._windows(connector, request_id):
                first_chunk = group.next_stored_chunk_idx
                if request_id in ended:  # its blocks were free before this step took some
                    first_chunk = 0
                    _forget(group.block_ids, connector._current_batch_allocated_block_ids)
                if chunk_blocks > 1:
                    num_needed = self._hit_blocks[number]
                    _keep_whole(group.block_ids, first_chunk, chunk_blocks, num_needed)

    def _windows(self, connector: Any, request_id: str) -> Iterator[tuple[int, Any]]:
        """Yield the groups of a request that have windows, each with its number."""
        request = connector._req_status.get(request_id)
        if request is None:
            return
        for config, group in zip(
            connector.config.kv_group_configs, request.group_states, strict=True
        ):
            if config.group_idx in self._hit_blocks:
                yield config.group_idx, group

    @property
    def _connector(self) -> Any:
        return self._core.scheduler.connector.connector_scheduler


def _forget(block_ids: list[int], gone: set[int]) -> None:
    if not gone.isdisjoint(block_ids):
        block_ids[:] = [NULL_BLOCK if each in gone else each for each in block_ids]


def _keep_whole(block_ids: list[int], first_chunk: int, chunk_blocks: int, num_needed: int) -> None:
    """Forget each chunk that lacks a block which a hit would load.

    vLLM stores a chunk without blocks that are missing, and loads it as if they were there. It
    finds the place of a block from that of the first one, so nothing may be missing behind that.
    """
    num_needed = min(num_needed, chunk_blocks)
    is_first = True
    for start in range(first_chunk * chunk_blocks, len(block_ids) - chunk_blocks + 1, chunk_blocks):
        end = start + chunk_blocks
        if block_ids[end - 1] == NULL_BLOCK:  # vLLM passes over it
            continue
        num_last = 0
        while num_last < chunk_blocks and block_ids[end - 1 - num_last] != NULL_BLOCK:
            num_last += 1
        if num_last == chunk_blocks or (is_first and num_last >= num_needed):
            is_first = False
            num_forgotten = chunk_blocks - num_last
        else:
            num_forgotten = chunk_blocks
        block_ids[start : start + num_forgotten] = [NULL_BLOCK] * num_forgotten
