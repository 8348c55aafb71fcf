"""vLLM's host tier in the host budget, and what was copied to it, from it and below it."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvcached_core.config import Config
from kvcached_core.weights import counted_tier
from kvcached_core.weights.host_tier import DISK, TierCounts

SETTING = "--kv-offloading-size"
# Where vLLM has a host tier that its processes share. An engine's id is no other engine's. Where
# vLLM removes the file itself, at the start or at the end, there is nothing of that name to remove.
REGION = "/dev/shm/vllm_offload_{}.mmap"  # noqa: S108  vLLM's own
# vLLM's own counters of the tiers below the host's; 0.28 has them, and a label that names the tier.
READ, WRITTEN = "vllm:kv_offload_tiering_read_", "vllm:kv_offload_tiering_write_"
CHUNK_HITS = "vllm:kv_offload_tiering_chunk_hits"
ON_DISK = ":fs"


def tier_bytes(vllm_config: Any) -> int:
    """Return the host memory that all ranks of an engine take for copies together, in bytes."""
    extra = vllm_config.kv_transfer_config.kv_connector_extra_config
    return int(extra.get("cpu_bytes_to_use") or 0)  # without it vLLM ends the start itself


def region_of(vllm_config: Any) -> str:
    """Return the file in which vLLM has an engine's host tier, or had it at its start."""
    return REGION.format(vllm_config.kv_transfer_config.engine_id)


def disk_folders(vllm_config: Any) -> list[str]:
    """Return where the tiers on disk of an engine lie."""
    tiers = vllm_config.kv_transfer_config.kv_connector_extra_config.get("secondary_tiers", ())
    return [str(tier["root_dir"]) for tier in tiers if "root_dir" in tier]


def disk_counts(stats: Mapping[str, Any]) -> TierCounts | None:
    """Return what the tiers on disk did, of a step's statistics of the connector.

    Returns:
        None if the step says nothing of them.
    """
    data: Mapping[str, Mapping[tuple[str, ...], float]] = stats.get("data", {})
    found = {
        name: sum(value for labels, value in data[name].items() if _is_disk(labels))
        for name in (READ + "bytes", READ + "time", WRITTEN + "bytes", WRITTEN + "time", CHUNK_HITS)
        if any(map(_is_disk, data.get(name, ())))
    }
    if not found:
        return None
    return TierCounts(
        DISK,
        stored_bytes=int(found.get(WRITTEN + "bytes", 0)),
        loaded_bytes=int(found.get(READ + "bytes", 0)),
        store_seconds=found.get(WRITTEN + "time", 0.0),
        load_seconds=found.get(READ + "time", 0.0),
        num_chunk_hits=int(found.get(CHUNK_HITS, 0)),
    )


def _is_disk(labels: Sequence[str]) -> bool:
    return bool(labels) and labels[0].endswith(ON_DISK)


class CountedTier(counted_tier.CountedTier):
    """The host tier of one vLLM engine, and its tiers on disk.

    Args:
        config: Our settings.
        instance: The engine's name.
        num_bytes: Its size.
        clock: Returns seconds.
        folders: Those of the tiers on disk.
        region: The file in which vLLM has it.
    """

    def __init__(
        self,
        config: Config,
        instance: str,
        num_bytes: int,
        clock: Callable[[], float] = time.monotonic,
        folders: Sequence[str] = (),
        region: str = "",
    ) -> None:
        super().__init__(config, instance, num_bytes, setting=SETTING, clock=clock, region=region)
        self.folders = folders

    def copied(self, transfers: Any, *, is_last: bool) -> None:
        """Note the copies that ranks reported, a `TransferStats`; tell others now and then.

        Args:
            transfers: Bytes and seconds of both directions.
            is_last: No copy is open, so nothing may follow soon.
        """
        self.stored(transfers.store.bytes, transfers.store.time)
        self.loaded(transfers.load.bytes, transfers.load.time)
        self.tell(is_last=is_last)
