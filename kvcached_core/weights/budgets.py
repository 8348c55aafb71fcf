"""The host budget as settings say it, with the disk that images go to."""

from kvcached_core.config import Config
from kvcached_core.weights.disk_store import disk_store
from kvcached_core.weights.host_budget import HostBudget


def make_budget(config: Config, usable_bytes: int | None = None) -> HostBudget:
    """Return the host budget; see `HostBudget`."""
    return HostBudget(config, usable_bytes, disk_store(config))
