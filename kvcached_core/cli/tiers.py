"""What people are told of the caches that engines have offloaded to host memory and disks."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from kvcached_core.cli.added import Added
from kvcached_core.cli.columns import short_bytes
from kvcached_core.config import read_config
from kvcached_core.errors import KVCachedError
from kvcached_core.weights.host_tier import DISK, TierCounts, TierView, read_tiers


def tiers(directory: Path) -> list[TierView]:
    """Return the tiers of the engines in a folder of ledgers; none where settings are wrong."""
    try:
        config = read_config()
    except KVCachedError:
        return []
    return read_tiers(config.model_copy(update={"dir": directory}).copies_dir)


def tier_text(view: TierView) -> str:
    """Return what an engine has offloaded, as part of a line."""
    return f"offloaded {short_bytes(view.held_bytes)} of {short_bytes(view.reserved_bytes)}"


def with_tiers(
    said: Sequence[Added], views: Sequence[TierView], names: Collection[str]
) -> list[Added]:
    """Return what packages say of instances, with the columns of their tiers.

    Args:
        said: What packages say.
        views: The tiers.
        names: The instances that are there.
    """
    cells = {view.instance: _cells(view) for view in views if view.instance in names}
    known = [replace(each, cells={**each.cells, **cells.pop(each.instance, {})}) for each in said]
    return [*known, *(Added(name, name, cells=more) for name, more in cells.items())]


def _cells(view: TierView) -> dict[str, str]:
    host = [each for each in view.counts if each.tier != DISK]
    disk = [each for each in view.counts if each.tier == DISK]
    cells = {
        "offloaded": short_bytes(view.held_bytes),
        "loaded": _loaded(host),
        "in": _seconds(host),
        "hits": str(sum(each.num_hits for each in host)),
    }
    return cells | ({"from disk": f"{_loaded(disk)} in {_seconds(disk)}"} if disk else {})


def _loaded(counts: Sequence[TierCounts]) -> str:
    return short_bytes(sum(each.loaded_bytes for each in counts))


def _seconds(counts: Sequence[TierCounts]) -> str:
    return f"{sum(each.load_seconds for each in counts):.1f} s"
