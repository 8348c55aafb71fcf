"""What holds pages for copies is told by a step's metadata, and ended by every rank's report."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, call, patch

import numpy as np
import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
    OffloadingConnectorMetadata,
    OffloadingWorkerMetadata,
    TransferJob,
)
from vllm.v1.kv_offload.base import GPULoadStoreSpec, LoadStoreSpec

from kvcached_vllm.open_copies import OpenCopies, copied_ids, finish_copies

pytestmark = [pytest.mark.vllm, pytest.mark.older_release]


def device(*block_ids: int) -> GPULoadStoreSpec:
    return GPULoadStoreSpec(list(block_ids), group_sizes=[len(block_ids)], block_indices=[0])


def step(
    stores: dict[int, tuple[int, ...]], loads: dict[int, tuple[int, ...]] | None = None
) -> OffloadingConnectorMetadata:
    host = LoadStoreSpec()
    return OffloadingConnectorMetadata(
        {job: TransferJob("load", host, device(*ids)) for job, ids in (loads or {}).items()},
        {job: TransferJob("store", device(*ids), host) for job, ids in stores.items()},
    )


def reports(**num: int) -> OffloadingWorkerMetadata:
    return OffloadingWorkerMetadata({int(job.strip("_")): count for job, count in num.items()})


def copies(num_ranks: int) -> tuple[OpenCopies, Mock, Mock]:
    engine, pool = Mock(), Mock()
    return OpenCopies(engine, pool, num_ranks, Mock()), engine, pool


def test_stores_hold_what_they_read_before_freed_blocks_are_let_go() -> None:
    log = Mock()
    open_copies = OpenCopies(log.engine, log.pool, 1, Mock())
    open_copies.begin(step({7: (3, 4), 8: (9,)}, {5: (1,)}))
    *held, settled = log.mock_calls
    assert [list(map(int, one.args[0])) for one in held] == [[3, 4], [9]]
    assert [one.args[1] for one in held] == [7, 8]
    assert settled == call.engine.settled()
    assert open_copies.job_ids == {5, 7, 8}


def test_a_copy_ends_when_the_last_rank_has_reported_it() -> None:
    open_copies, engine, pool = copies(num_ranks=3)
    open_copies.begin(step({7: (3,)}))
    open_copies.end(reports(_7=1))
    open_copies.end(reports(_7=1))
    engine.release.assert_not_called()
    pool.copied.end.assert_not_called()
    open_copies.end(reports(_7=1))
    engine.release.assert_called_once_with(7)
    pool.copied.end.assert_called_once_with(7)
    assert not open_copies.job_ids


def test_reports_of_jobs_that_were_forgotten_are_nothing() -> None:
    open_copies, engine, _ = copies(num_ranks=2)
    open_copies.begin(step({7: (3,)}))
    open_copies.clear()
    open_copies.end(reports(_7=1))
    assert not open_copies.job_ids
    engine.release.assert_called_with(7)


def test_the_ids_of_all_copies_of_a_step_are_checked() -> None:
    assert sorted(copied_ids(step({7: (3, 4)}, {5: (1,)}))) == [1, 3, 4]
    assert all(isinstance(one, int) for one in copied_ids(step({7: (3,)})))
    assert not isinstance(device(3).block_ids[0], int)
    assert isinstance(device(3).block_ids, np.ndarray)
    assert list(copied_ids(None)) == []


def test_a_rank_begins_what_it_put_off_and_waits_for_all_jobs() -> None:
    group: Any = SimpleNamespace(handle_preemptions=Mock())
    module = "vllm.distributed.kv_transfer"
    with (
        patch(f"{module}.has_kv_transfer_group", lambda: True),
        patch(f"{module}.get_kv_transfer_group", lambda: group),
    ):
        finish_copies(None, {7, 8})
    (flush,) = group.handle_preemptions.call_args.args
    assert flush == OffloadingConnectorMetadata({}, {}, {7, 8})


def test_copies_are_told_when_none_is_open() -> None:
    tier = Mock()
    open_copies = OpenCopies(Mock(), Mock(), 1, tier)
    open_copies.begin(step({7: (3,)}, {5: (1, 2), 6: (4,)}))
    done = reports(_5=1, _6=1)
    open_copies.end(done)
    tier.copied.assert_called_with(done.transfer_stats, is_last=False)
    open_copies.end(reports(_7=1))
    assert tier.copied.call_args.kwargs == {"is_last": True}


def test_a_request_counts_by_the_tokens_that_it_loads_and_not_by_blocks() -> None:
    tier = Mock()
    open_copies = OpenCopies(Mock(), Mock(), 1, tier)
    open_copies.loads(96)
    open_copies.begin(step({}, {5: (1, 2)}))
    tier.hit.assert_called_once_with(96)


@pytest.mark.parametrize(("folders", "num_told"), [(["/nvme/kv"], 1), ([], 0)])
def test_what_disks_did_is_told_where_there_are_some(folders: list[str], num_told: int) -> None:
    tier = Mock(folders=folders)
    open_copies = OpenCopies(Mock(), Mock(), 1, tier)
    data = {"vllm:kv_offload_tiering_read_bytes": {("1:fs",): 5}}
    nothing = SimpleNamespace(kv_connector_stats=None)
    outputs = {
        client: SimpleNamespace(scheduler_stats=stats)
        for client, stats in enumerate(
            [None, nothing, SimpleNamespace(kv_connector_stats={"data": data})]
        )
    }
    open_copies.count(outputs)
    assert [one.args[0].loaded_bytes for one in tier.moved.mock_calls] == [5] * num_told
    assert tier.tell.mock_calls == [call(is_last=True)] * num_told
