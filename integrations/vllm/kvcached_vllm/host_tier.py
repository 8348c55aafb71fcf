"""vLLM's host tier in the host budget, and what was copied to it and from it."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from kvcached_core.config import Config
from kvcached_core.weights import counted_tier

SETTING = "--kv-offloading-size"
# Where vLLM has a host tier that its processes share. An engine's id is no other engine's. Where
# vLLM removes the file itself, at the start or at the end, there is nothing of that name to remove.
REGION = "/dev/shm/vllm_offload_{}.mmap"  # noqa: S108  vLLM's own


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
