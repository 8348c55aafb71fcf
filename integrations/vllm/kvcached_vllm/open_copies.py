"""Copies between the KV cache and the host that a connector has begun, or is about to begin.

A request's blocks are free the moment it ends, and its last copies begin a step or two later. vLLM
waits for a copy before it uses such a block again, and for nothing else; so the pages stay.
"""

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

from kvcached_vllm.host_tier import disk_counts

if TYPE_CHECKING:
    from kvcached_vllm.engine import VllmEngine
    from kvcached_vllm.host_tier import CountedTier
    from kvcached_vllm.offloaded_pool import OffloadedBlockPool


class OpenCopies:
    """The jobs of vLLM's OffloadingConnector that not every rank has reported.

    All of it is told by what passes between the scheduler and the workers: a step's metadata and
    what the workers answer. The scheduler's thread calls it.

    Args:
        engine: The engine.
        pool: Whose pages are held.
        num_ranks: How many workers report each job.
        tier: What counts the copies.
    """

    def __init__(
        self,
        engine: "VllmEngine",
        pool: "OffloadedBlockPool",
        num_ranks: int,
        tier: "CountedTier",
    ) -> None:
        self._engine = engine
        self._pool = pool
        self._num_ranks = num_ranks
        self._tier = tier
        self._num_missing: dict[int, int] = {}  # reports, by job

    @property
    def job_ids(self) -> set[int]:
        """The open jobs, loads included."""
        return set(self._num_missing)

    def begin(self, metadata: Any) -> None:
        """Hold what the jobs of a scheduled step read; what was freed before has its jobs now.

        Blocks that a load writes are a waiting request's, so nobody gives their pages.
        """
        for job_id, job in metadata.store_jobs.items():
            self._num_missing[job_id] = self._num_ranks
            self._pool.hold(job.src_spec.block_ids, job_id)
        for job_id in metadata.load_jobs:
            self._num_missing[job_id] = self._num_ranks
        self._engine.settled()

    def loads(self, num_tokens: int) -> None:
        """Note a request that loads so many tokens: of a window it loads fewer blocks than that."""
        self._tier.hit(num_tokens)

    def end(self, worker_metadata: Any) -> None:
        """Let go of the jobs that the last rank has reported with a step's output."""
        for job_id, num_reports in worker_metadata.completed_jobs.items():
            num_missing = self._num_missing.pop(job_id, num_reports) - num_reports
            if num_missing > 0:
                self._num_missing[job_id] = num_missing
            else:
                self._engine.release(job_id)
                self._pool.copied.end(job_id)
        self._tier.copied(worker_metadata.transfer_stats, is_last=not self._num_missing)

    def count(self, outputs: Mapping[int, Any]) -> None:
        """Note what a step's outputs, one for each client, say of the tiers on disk.

        They say it unless vLLM's statistics are switched off, from 0.28 on.
        """
        if not self._tier.folders:
            return
        for output in outputs.values():
            stats = output.scheduler_stats and output.scheduler_stats.kv_connector_stats
            if stats and (moved := disk_counts(stats)):
                self._tier.moved(moved)
                self._tier.tell(is_last=not self._num_missing)

    def computed(self, num_tokens: int) -> None:
        """Note that a step has ended which computed so many tokens."""
        self._tier.computed(num_tokens)

    def reset(self) -> None:
        """Note that the connector has forgotten all that it stored."""
        self._tier.reset()
        self._pool.copied.clear()

    def clear(self) -> None:
        """Forget all jobs: none of their copies is open any more."""
        self._num_missing.clear()


def finish_copies(_worker: Any, job_ids: set[int]) -> None:
    """Have a rank begin what it put off, and wait for these jobs; `collective_rpc` calls this."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
        OffloadingConnectorMetadata,
    )

    if has_kv_transfer_group():
        flush = OffloadingConnectorMetadata({}, {}, jobs_to_flush=set(job_ids))
        get_kv_transfer_group().handle_preemptions(flush)


def copied_ids(metadata: Any) -> Iterator[int]:
    """Yield the ids of the blocks that the copies of a step read and write."""
    if metadata is not None:
        stored = (job.src_spec.block_ids for job in metadata.store_jobs.values())
        loaded = (job.dst_spec.block_ids for job in metadata.load_jobs.values())
        yield from map(int, chain.from_iterable(chain(stored, loaded)))
