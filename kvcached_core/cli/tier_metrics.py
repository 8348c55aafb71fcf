"""Prometheus metrics of offloaded caches, read from the engines' claims at each scrape."""

from collections.abc import Callable, Iterator
from pathlib import Path

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from kvcached_core.cli.tiers import tiers
from kvcached_core.weights.host_tier import DISK, HOST, TierCounts

PREFIX = "kvcached_offload_"
COUNTERS: dict[str, tuple[str, Callable[[TierCounts], float]]] = {
    "stored_bytes": ("Bytes copied to the tier.", lambda c: c.stored_bytes),
    "loaded_bytes": ("Bytes copied from the tier.", lambda c: c.loaded_bytes),
    "hits": ("Requests that found a prefix in host memory.", lambda c: c.num_hits),
    "chunk_hits": ("Chunks that were found on disk.", lambda c: c.num_chunk_hits),
    "hit_tokens": ("Tokens that were loaded and not computed.", lambda c: c.hit_tokens),
    "store_seconds": ("What copies to the tier took.", lambda c: c.store_seconds),
    "load_seconds": ("What copies from the tier took.", lambda c: c.load_seconds),
}
# What a tier's kind does not count.
NOT_COUNTED = {"hits": (DISK,), "chunk_hits": (HOST,)}


class TierCollector:
    """Reads the claims of a folder whenever Prometheus asks."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def collect(self) -> Iterator[Metric]:
        """Yield every metric of every tier."""
        views = tiers(self._directory)
        reserved = GaugeMetricFamily(
            PREFIX + "reserved_bytes",
            "Host memory that the engine has for its offloaded cache.",
            labels=["engine_instance"],
        )
        for view in views:
            reserved.add_metric([view.instance], view.reserved_bytes)
        yield reserved
        labels = ["engine_instance", "tier"]
        held = GaugeMetricFamily(PREFIX + "held_bytes", "What lies in the tier.", labels=labels)
        counts = [(view.instance, each) for view in views for each in view.counts]
        for instance, each in counts:
            if each.tier == DISK:
                continue  # nobody knows: it outlives engines, and others write there
            held.add_metric([instance, each.tier], each.held_bytes)
        yield held
        for name, (text, read) in COUNTERS.items():
            family = CounterMetricFamily(PREFIX + name, text, labels=labels)
            for instance, each in counts:
                if each.tier in NOT_COUNTED.get(name, ()):
                    continue
                family.add_metric([instance, each.tier], read(each))
            yield family
