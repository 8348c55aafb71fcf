"""Prometheus metrics of every instance and device, read from the ledgers at each scrape."""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from pathlib import Path

from kvcached_core.errors import KVCachedError
from kvcached_core.ledger.activations import ACTIVATION_BOUNDS_SECONDS, Activations
from kvcached_core.ledger.reach import pressure
from kvcached_core.ledger.survey import survey
from kvcached_core.ledger.times import BOUNDS_SECONDS, CallTimes
from kvcached_core.ledger.view import DeviceView, InstanceView

try:
    from prometheus_client import CollectorRegistry, generate_latest, start_http_server
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
        Metric,
    )
except ImportError as error:
    raise KVCachedError(
        "metrics need prometheus-client; pip install 'kvcached-elastic[metrics]'"
    ) from error

PREFIX = "kvcached_"
DEVICE_GAUGES: dict[str, tuple[str, Callable[[DeviceView], float]]] = {
    "device_capacity_bytes": ("What all instances may hold.", lambda d: d.capacity_bytes),
    "device_unclaimed_bytes": ("Neither resident nor promised.", lambda d: d.free_bytes),
}
INSTANCE_GAUGES: dict[str, tuple[str, Callable[[InstanceView], float]]] = {
    "resident_bytes": (
        "Mapped bytes: used, cached, idle and weights.",
        lambda i: i.resident_bytes,
    ),
    "used_bytes": ("Mapped bytes of live requests.", lambda i: i.used_bytes),
    "cached_bytes": ("Mapped bytes that only the prefix cache wants.", lambda i: i.cached_bytes),
    "idle_bytes": ("Mapped bytes that hold nothing.", lambda i: i.idle_bytes),
    "weights_bytes": ("Mapped bytes of weights that yield.", lambda i: i.weights_bytes),
    "weights_needed_bytes": ("What of them it needs to run.", lambda i: i.weights_needed_bytes),
    "weights_offered_bytes": ("What others may ask for.", lambda i: i.weights_offered_bytes),
    "promised_bytes": ("Promised and not mapped yet.", lambda i: i.promised_bytes),
    "announced_bytes": (
        "About to be allocated beside the KV cache, or by a program.",
        lambda i: i.static_bytes,
    ),
    "waiting_bytes": ("Refused, and still wanted.", lambda i: i.waiting_bytes),
    "virtual_bytes": ("What the engine believes to have.", lambda i: i.virtual_bytes),
    "token_bytes": ("KV of one token, on all ranks of the device.", lambda i: i.token_bytes),
    "floor_bytes": ("What it can always get back.", lambda i: i.floor_bytes),
    "priority": ("Instances with a lower value give first.", lambda i: i.priority),
}
INSTANCE_COUNTERS: dict[str, tuple[str, Callable[[InstanceView], float]]] = {
    "mapped_bytes": ("Bytes mapped since the start.", lambda i: i.num_mapped_bytes),
    "unmapped_bytes": ("Bytes unmapped since the start.", lambda i: i.num_unmapped_bytes),
    "refusals": ("Promises that were not given in full.", lambda i: i.num_refused),
    "pressure_asked": ("Times that others asked for memory.", lambda i: i.num_asked),
    "pressure_answered": ("Times that it answered.", lambda i: i.num_answered),
    "activations": ("Times that its weights came back.", lambda i: i.activations.num),
    "map_failures": ("Pages that could not be mapped.", lambda i: i.map_times.num_failures),
    "unmap_failures": ("Pages that could not be unmapped.", lambda i: i.unmap_times.num_failures),
}
INSTANCE_HISTOGRAMS: dict[
    str,
    tuple[str, tuple[float, ...], Callable[[InstanceView], CallTimes | Activations]],
] = {
    "map_seconds": ("Mapping a page, of KV or of weights.", BOUNDS_SECONDS, lambda i: i.map_times),
    "unmap_seconds": (
        "Unmapping a page, of KV or of weights.",
        BOUNDS_SECONDS,
        lambda i: i.unmap_times,
    ),
    "activation_seconds": (
        "From the request on until all weights are back.",
        ACTIVATION_BOUNDS_SECONDS,
        lambda i: i.activations,
    ),
}


class LedgerCollector:
    """Reads the ledgers in a folder whenever Prometheus asks."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def collect(self) -> Iterator[Metric]:
        """Yield every metric of every device and instance."""
        found = survey(self._directory)
        devices = found.devices
        yield GaugeMetricFamily(
            PREFIX + "unreadable_ledgers",
            "Devices of which nothing is known; `kvcached doctor` says why.",
            len(found.problems),
        )
        for name, (text, value) in DEVICE_GAUGES.items():
            family = GaugeMetricFamily(PREFIX + name, text, labels=["device"])
            for device in devices:
                family.add_metric([device.device], value(device))
            yield family
        full = GaugeMetricFamily(
            PREFIX + "pressure",
            "Used, of what it could use: 1 where it can get no more memory, or waits for it.",
            labels=_LABELS,
        )
        for device in devices:
            for row in device.instances:
                full.add_metric([device.device, row.name, row.engine], pressure(device, row))
        yield full
        rows = [(device.device, row) for device in devices for row in device.instances]
        for name, (text, read) in INSTANCE_GAUGES.items():
            gauge = GaugeMetricFamily(PREFIX + name, text, labels=_LABELS)
            yield _filled(gauge, rows, read)
        for name, (text, read) in INSTANCE_COUNTERS.items():
            counter = CounterMetricFamily(PREFIX + name, text, labels=_LABELS)
            yield _filled(counter, rows, read)
        for name, (text, bounds, times_of) in INSTANCE_HISTOGRAMS.items():
            titles = (*map(str, bounds), "+Inf")
            histogram = HistogramMetricFamily(PREFIX + name, text, labels=_LABELS)
            for device_name, row in rows:
                times = times_of(row)
                buckets = list(zip(titles, accumulate(times.buckets), strict=True))
                labels = [device_name, row.name, row.engine]
                histogram.add_metric(labels, buckets, times.seconds)
            yield histogram
        limit = GaugeMetricFamily(
            PREFIX + "limit_bytes", "What it may hold at most; absent without one.", labels=_LABELS
        )
        limited = [(device, row) for device, row in rows if row.limit_bytes is not None]
        yield _filled(limit, limited, lambda row: row.limit_bytes or 0)


# Prometheus writes labels of its own, `instance` and `job`, over those of the same name.
_LABELS = ["device", "engine_instance", "engine"]


def _filled(
    family: GaugeMetricFamily | CounterMetricFamily,
    rows: Iterable[tuple[str, InstanceView]],
    read: Callable[[InstanceView], float],
) -> Metric:
    for device, row in rows:
        family.add_metric([device, row.name, row.engine], read(row))
    return family


def exposition(directory: Path) -> str:
    """Return all metrics in Prometheus' text format."""
    return generate_latest(_registry(directory)).decode()


def serve(directory: Path, host: str, port: int) -> None:
    """Serve the metrics until SIGINT or SIGTERM."""
    end = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: end.set())
    try:
        server, thread = start_http_server(port, addr=host, registry=_registry(directory))
    except OSError as error:
        raise KVCachedError(f"metrics cannot be served on {host}:{port}: {error}") from error
    end.wait()
    server.shutdown()
    server.server_close()
    thread.join()


def _registry(directory: Path) -> CollectorRegistry:
    from kvcached_core.cli.image_metrics import ImageCollector
    from kvcached_core.cli.tier_metrics import TierCollector

    registry = CollectorRegistry()
    registry.register(LedgerCollector(directory))
    registry.register(TierCollector(directory))
    registry.register(ImageCollector())
    return registry
