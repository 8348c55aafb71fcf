"""What the host tiers of elastic servers did, as the servers say it themselves."""

from pathlib import Path

from kvcached_core.config import read_config
from kvcached_core.weights.host_budget import HostBudget
from kvcached_core.weights.host_tier import HOST, TierCounts, read_tiers


def host_counts(directory: Path) -> dict[str, TierCounts]:
    """Return what each server's host tier did so far, by its name; none that said nothing yet.

    Args:
        directory: The folder of the servers' ledgers.
    """
    folder = HostBudget(read_config({"KVCACHED_DIR": str(directory)})).folder
    return {
        view.instance: counts
        for view in read_tiers(folder)
        for counts in view.counts
        if counts.tier == HOST
    }
