"""A copier for vLLM's OffloadingConnector that runs on a CPU: memmove in a thread, after a delay.

The connector, its scheduler's half, its manager and its tiers are vLLM's own; it loads a spec of
ours by `spec_name` and `spec_module_path`. vLLM's copier does the same on streams of a GPU. Here a
copy of a page that was unmapped meanwhile ends the process, and one whose bytes changed fails.

Where `extra_config` has it, `delay_ms` is the range of the delay of each job, `rank_delay_ms` what
each further rank takes longer, `copier_seed` what the delay is drawn with, `copier_report` a file
with what was copied and the first fault, and `spoils_loads` whether other layers' bytes are loaded.
"""

import json
import random
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from helpers.delayed_copies import LOADS_SPOILED, Direction, Job, Piece, from_other_layers, sum_of

# The copiers of this process.
made: "list[DelayedWorker]" = []


class DelayedWorker(OffloadingWorker):  # type: ignore[misc]  vLLM has no types here
    """Stands in for vLLM's `CPUOffloadingWorker`; see the module.

    Args:
        spec: The spec that makes it.
        caches: vLLM's canonical view of the KV caches.
        region: The host tier.
    """

    def __init__(self, spec: Any, caches: Any, region: SharedOffloadRegion) -> None:
        extra = spec.extra_config
        self._region = region
        self._blocks_per_chunk = spec.blocks_per_chunk
        self._refs = caches.group_data_refs
        self._device = [each.tensor for each in caches.tensors]
        self._host = [
            region.create_next_worker_view(each.page_size_bytes * self._blocks_per_chunk)
            for each in caches.tensors
        ]
        self._delay_ms = extra.get("delay_ms", (0, 0))
        self._more_ms = extra.get("rank_delay_ms", 0) * spec.config.parallel.rank
        self._random = random.Random(extra.get("copier_seed", 0))
        self._report_path = extra.get("copier_report")
        if extra.get("spoils_loads"):
            LOADS_SPOILED.set()
        # A tier below writes to the host's chunks as well, and no sum is known of that.
        self._has_tiers = isinstance(spec, TieringOffloadingSpec)
        self._sums: dict[tuple[int, int, int], int] = {}
        self._stores, self._loads = Direction(is_store=True), Direction(is_store=False)
        self._num_jobs = {"stores": 0, "loads": 0}
        made.append(self)

    def sizes(self) -> list[int]:
        """Return the bytes that a chunk has in the host tier, each size once."""
        return sorted({host.shape[1] for host in self._host})

    def spoil(self, chunk_bytes: int) -> None:
        """Write over all that the host tier has of chunks of one size."""
        self._sums.clear()
        for host in self._host:
            if host.shape[1] == chunk_bytes:
                host.fill_(64)

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        pieces = list(self._pieces(src_spec, dst_spec))
        sums = [sum_of(piece.device_address, piece.num_bytes) for piece in pieces]
        if not self._has_tiers:
            self._sums.update((piece.key, each) for piece, each in zip(pieces, sums, strict=True))
        self._submit(self._stores, "stores", Job(job_id, pieces, [*sums], self._delay()))
        return True

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        pieces = list(self._pieces(dst_spec, src_spec))
        if LOADS_SPOILED.is_set():
            pieces = from_other_layers(pieces)
        # What another process wrote, or the tier on disk, this copier has no sum of.
        sums = [
            self._sums.get(piece.key, sum_of(piece.host_address, piece.num_bytes))
            for piece in pieces
        ]
        self._submit(self._loads, "loads", Job(job_id, pieces, [*sums], self._delay()))
        return True

    def get_finished(self) -> list[TransferResult]:
        results = []
        for direction in (self._stores, self._loads):
            for job in direction.take_done():
                num_bytes = sum(piece.num_bytes for piece in job.pieces)
                results.append(
                    TransferResult(
                        job.job_id, success=True, transfer_size=num_bytes, transfer_time=job.seconds
                    )
                )
                if direction is self._loads:
                    self._check_loaded(job)
        self._report()
        if fault := self._stores.fault or self._loads.fault:
            raise AssertionError(fault)
        return results

    def wait(self, job_ids: set[int]) -> None:
        self._stores.wait(job_ids)
        self._loads.wait(job_ids)

    def shutdown(self) -> None:
        self._stores.close()
        self._loads.close()
        self._report()
        self._device, self._host = [], []
        self._region.cleanup()

    def _submit(self, direction: Direction, word: str, job: Job) -> None:
        self._num_jobs[word] += 1
        direction.submit(job)

    def _check_loaded(self, job: Job) -> None:
        """Look again when the load is reported: nothing may have written over it meanwhile."""
        for piece, expected in zip(job.pieces, job.sums, strict=True):
            if sum_of(piece.device_address, piece.num_bytes) != expected:
                self._loads.fault = (
                    self._loads.fault or f"load {job.job_id} was written over: {piece}"
                )

    def _delay(self) -> float:
        return (self._random.uniform(*self._delay_ms) + self._more_ms) / 1000

    def _pieces(self, device_spec: Any, host_spec: Any) -> Iterator[Piece]:
        device_ids, chunks = device_spec.block_ids.tolist(), deque(host_spec.block_ids.tolist())
        per_chunk, at = self._blocks_per_chunk, 0
        groups = zip(device_spec.group_sizes, device_spec.block_indices, self._refs, strict=True)
        for group_size, first_index, refs in groups:
            skipped = first_index % per_chunk
            num_chunks = -(-(skipped + group_size) // per_chunk) if group_size else 0
            of_group = [chunks.popleft() for _ in range(num_chunks)]
            for number, block_id in enumerate(device_ids[at : at + group_size], skipped):
                chunk, index = of_group[number // per_chunk], number % per_chunk
                for ref in refs:
                    yield self._piece(ref, block_id, chunk, index)
            at += group_size
        assert not chunks
        assert at == len(device_ids)

    def _piece(self, ref: Any, block_id: int, chunk: int, index: int) -> Piece:
        device, host = self._device[ref.tensor_idx], self._host[ref.tensor_idx]
        offset = index * (host.shape[1] // self._blocks_per_chunk)
        return Piece(
            (chunk, index, ref.tensor_idx),
            device.data_ptr() + block_id * device.stride(0),
            host.data_ptr() + chunk * host.stride(0) + offset,
            ref.page_size_bytes,
        )

    def _report(self) -> None:
        if self._report_path:
            counts = {
                **self._num_jobs,
                "stored_bytes": self._stores.num_bytes,
                "loaded_bytes": self._loads.num_bytes,
            }
            unfinished = Path(self._report_path).with_suffix(".new")
            unfinished.write_text(json.dumps(counts))
            unfinished.replace(self._report_path)


class _Delayed:
    """What both specs do in the place of vLLM's copier."""

    def get_worker(self: Any, kv_caches: Any) -> OffloadingWorker:
        if self._worker is None:
            num_chunks = getattr(self, "num_chunks", None) or self.num_blocks  # up to 0.28
            region = SharedOffloadRegion(
                self.config.engine_id,
                num_chunks,
                self.config.parallel.rank,
                self.kv_bytes_per_chunk,
                self.cpu_page_size_per_worker,
            )
            self._worker = DelayedWorker(self, kv_caches, region)
        return self._worker


class DelayedSpec(_Delayed, CPUOffloadingSpec):  # type: ignore[misc]
    """vLLM's CPU tier with the delayed copier."""


class DelayedTiersSpec(_Delayed, TieringOffloadingSpec):  # type: ignore[misc]
    """vLLM's CPU tier over others, with the delayed copier."""
