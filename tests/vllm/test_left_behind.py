"""What vLLM's connector forgets of blocks that a window has left behind."""

import sys
from types import SimpleNamespace

import pytest

from kvcached_core.memory.geometry import Geometry
from kvcached_patches.around import setting
from kvcached_vllm.left_behind import LeftBehind, left_behind
from kvcached_vllm.transfer_hooks import connector_build_store_jobs

pytestmark = [pytest.mark.vllm, pytest.mark.older_release]

GEOMETRY = Geometry(block_bytes=1024, num_planes=4, ids_per_page=16, blocks_per_page=4)
FULL, WINDOW = range(2)
ENDED, RUNNING = "ended", "running"


class Connector:
    """The scheduler's half of vLLM's, as far as it is read here.

    Args:
        chunk_blocks: The blocks of a chunk.
        requests: The blocks that it names of each request's full layers and windows.
        num_stored: The chunks that it has passed over.
        taken: The blocks that this step has taken.
    """

    def __init__(
        self,
        chunk_blocks: int = 1,
        num_stored: int = 0,
        taken: tuple[int, ...] = (),
        **requests: tuple[list[int], list[int]],
    ) -> None:
        groups = tuple(SimpleNamespace(group_idx=number) for number in (FULL, WINDOW))
        self.config = SimpleNamespace(blocks_per_chunk=chunk_blocks, kv_group_configs=groups)
        self._current_batch_allocated_block_ids = set(taken)
        self._req_status = {
            name: SimpleNamespace(
                group_states=tuple(
                    SimpleNamespace(block_ids=ids, next_stored_chunk_idx=num_stored)
                    for ids in of_groups
                )
            )
            for name, of_groups in requests.items()
        }

    def named(self, request: str) -> list[list[int]]:
        return [group.block_ids for group in self._req_status[request].group_states]


def left(connector: Connector, *, num_needed: int = 2) -> LeftBehind:
    scheduler = SimpleNamespace(connector=SimpleNamespace(connector_scheduler=connector))
    return LeftBehind(SimpleNamespace(scheduler=scheduler), GEOMETRY, {WINDOW: num_needed})


def build(connector: Connector, *, num_needed: int = 2) -> None:
    """Have vLLM make the jobs of a step in which one request has ended."""
    output = SimpleNamespace(num_scheduled_tokens={RUNNING: 1}, finished_req_ids={ENDED})
    with setting(left_behind, left(connector, num_needed=num_needed)):
        made = connector_build_store_jobs(lambda *_: "jobs")(connector, output)
    assert made == "jobs"


def test_blocks_of_a_closed_page_are_named_no_more() -> None:
    connector = Connector(request=([3, 16, 19, 48], [33, 50, 0, 51]))
    left(connector).forget_pages([1, 2])
    assert connector.named("request") == [[3, 0, 0, 48], [0, 50, 0, 51]]


def test_a_request_that_ends_names_no_block_that_its_window_left_where_vllm_has_passed() -> None:
    connector = Connector(num_stored=3, ended=([1, 2, 3, 4], [5, 6, 7, 8]))
    own: tuple[list[int], list[int]] = ([1, 2, 3, 4], [0, 0, 7, 0])
    left(connector).forget_left(ENDED, own)
    assert connector.named(ENDED) == [[1, 2, 3, 4], [0, 0, 7, 8]]  # vLLM watches the last one
    left(connector).forget_left("unknown", own)


def test_a_request_that_has_ended_names_no_block_of_a_window_that_the_step_took() -> None:
    connector = Connector(
        num_stored=9, taken=(2, 6, 10), ended=([1, 2], [5, 6]), running=([9], [10])
    )
    build(connector)
    assert connector.named(ENDED) == [[1, 2], [5, 0]]  # vLLM waits for those of full layers
    assert connector.named(RUNNING) == [[9], [10]]  # they were its own all the time


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6, 7, 8]),
        ([0, 0, 0, 0, 5, 6, 7, 8, 9], [0, 0, 0, 0, 5, 6, 7, 8, 9]),
        ([0, 0, 3, 4, 5, 6, 7, 8], [0, 0, 3, 4, 5, 6, 7, 8]),
        ([0, 2, 0, 4, 5, 6, 7, 8], [0, 0, 0, 0, 5, 6, 7, 8]),
        ([1, 0, 3, 4, 5, 6, 7, 8], [0, 0, 3, 4, 5, 6, 7, 8]),
        ([1, 2, 3, 4, 0, 6, 7, 8], [1, 2, 3, 4, 0, 0, 0, 0]),
        ([1, 2, 3, 0, 0, 0, 7, 8], [1, 2, 3, 0, 0, 0, 7, 8]),
    ],
    ids=[
        "whole",
        "one is empty",
        "what a hit loads is there",
        "it is not",
        "it is, behind a gap",
        "behind another chunk",
        "behind one that vLLM passes over",
    ],
)
def test_a_chunk_is_stored_if_it_has_what_a_hit_loads_and_nothing_is_missing_behind_its_first_block(
    named: list[int], expected: list[int]
) -> None:
    connector = Connector(4, running=([7, 0, 8, 9], named), ended=([], []))
    build(connector)
    assert connector.named(RUNNING) == [[7, 0, 8, 9], expected]


def test_only_whole_chunks_are_stored_where_a_hit_may_end_inside_one() -> None:
    connector = Connector(4, running=([], [0, 2, 3, 4, 5, 6, 7, 8]), ended=([], []))
    build(connector, num_needed=sys.maxsize)
    assert connector.named(RUNNING)[WINDOW] == [0, 0, 0, 0, 5, 6, 7, 8]


def test_what_was_passed_over_is_looked_at_again_when_its_request_has_ended() -> None:
    connector = Connector(4, 1, running=([], [0, 0, 0, 4]), ended=([], [0, 0, 0, 4]))
    build(connector)
    assert connector.named(RUNNING)[WINDOW] == [0, 0, 0, 4]
    assert connector.named(ENDED)[WINDOW] == [0, 0, 0, 0]


def test_a_connector_without_such_an_engine_stores_as_vllm_does() -> None:
    connector = Connector(4, taken=(4,), ended=([], [0, 0, 0, 4]))
    output = SimpleNamespace(num_scheduled_tokens={}, finished_req_ids={ENDED})
    assert connector_build_store_jobs(lambda *_: "jobs")(connector, output) == "jobs"
    assert connector.named(ENDED)[WINDOW] == [0, 0, 0, 4]
