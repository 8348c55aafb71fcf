"""What Prometheus reads of the gateway: requests as they are counted, models as they are.

A model's name in a label is always one of the file, never what a client wrote.
"""

from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvcached_gateway.admin.views import DeviceRow, ModelRow
from kvcached_gateway.lease import Woken
from kvcached_gateway.observe import Answer, Where
from kvcached_gateway.settings.config import Settings
from kvcached_gateway.state import State

__all__ = ["Metrics"]

PREFIX = "kvcached_gateway_"
NO_CLASS = ""
MODEL_GAUGES: dict[str, tuple[str, Callable[[ModelRow], float]]] = {
    "in_flight": ("Requests that the engine has.", lambda row: row.num_leases),
    "queued": ("Requests that wait for it.", lambda row: row.num_waiting),
    "oldest_wait_seconds": (
        "How long the first of them has waited.",
        lambda row: row.oldest_wait_seconds,
    ),
    "average_start_seconds": (
        "What a start takes; 0 before the first.",
        lambda row: row.start_seconds,
    ),
    "pinned": ("1 where it is never stopped for another.", lambda row: float(row.is_pinned)),
    "weighted_rate": (
        "KV bytes a second over its goal for a token.",
        lambda row: row.weighted_rate,
    ),
    "prefill_tokens_per_second": (
        "How fast it reads prompts; 0 before it did.",
        lambda row: row.prefill_tokens_per_second,
    ),
}
DEVICE_GAUGES: dict[str, tuple[str, Callable[[DeviceRow], float]]] = {
    "device_capacity_bytes": ("What all engines may hold.", lambda row: row.capacity_bytes),
    "device_free_bytes": ("What nobody holds.", lambda row: row.free_bytes),
    "kv_pressure_ratio": (
        "Weighted rates over the memory that they share.",
        lambda row: row.kv_pressure_ratio,
    ),
}
STATES = (*map(str, State), "remote", "adapter")
SHORT_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 100.0)
LONG_SECONDS = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0)


class Metrics:
    """Counts of the gateway; an `Observer` for the data path. Used on the loop's thread.

    Args:
        settings: The settings that hold now, for goals of classes.
        models: Every model now; asked at each scrape.
        devices: Every device now; asked at each scrape.
    """

    def __init__(
        self,
        settings: Callable[[], Settings],
        models: Callable[[], Sequence[ModelRow]],
        devices: Callable[[], Sequence[DeviceRow]],
    ) -> None:
        self._settings = settings
        registry = self._registry = CollectorRegistry(auto_describe=True)
        registry.register(_Now(models, devices))

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(PREFIX + name, text, labels, registry=registry)

        def histogram(name: str, text: str, bounds: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(PREFIX + name, text, labels, registry=registry, buckets=bounds)

        self._requests = counter(
            "requests", "Answers of engines that went out.", "model", "class", "code"
        )
        self._refused = counter("refused", "Errors that the gateway answered itself.", "code")
        self._cancelled = counter("cancelled", "Requests whose client left.", "where")
        self._woken = counter(
            "woken_requests", "Requests that waited for a start or a wake.", "model", "what"
        )
        self._met = counter("slo_met", "Requests that met a goal.", "model", "what")
        self._missed = counter("slo_missed", "Requests that missed it.", "model", "what")
        self._late = counter("late", "Requests that went to the late ones of their line.", "model")
        self._transitions = counter(
            "transitions", "Changes of models' states.", "model", "from", "to"
        )
        self._evictions = counter(
            "evictions", "Engines that were stopped for something else.", "model", "for"
        )
        self._moves = counter("moves", "Engines that moved to another device.", "model")
        self._adopted = counter("adopted", "Engines of an earlier gateway that were kept.")
        self._reload_failures = counter("reload_failures", "Files with a mistake.")
        self._queue = histogram(
            "queue_seconds", "What a request spent in the line.", SHORT_SECONDS, "model"
        )
        self._ttft = histogram(
            "ttft_seconds", "From a request to the first byte.", SHORT_SECONDS, "model"
        )
        self._seconds = histogram(
            "request_seconds", "From a request to the last byte.", LONG_SECONDS, "model"
        )
        self._starts = histogram(
            "start_seconds",
            "From an engine's start to its first token.",
            LONG_SECONDS,
            "model",
        )

    def exposition(self) -> str:
        """Return everything in Prometheus's text format."""
        return generate_latest(self._registry).decode()

    def answered(self, answer: Answer) -> None:
        """See `Observer.answered`."""
        settings, model_id, ttft_seconds = self._settings(), answer.model_id, answer.ttft_seconds
        model = settings.models.get(model_id)
        name = answer.class_name or (model.class_name if model else None)
        goals = settings.classes.get(name or NO_CLASS)
        class_name = NO_CLASS if goals is None else goals.name
        self._requests.labels(model_id, class_name, answer.status).inc()
        self._queue.labels(model_id).observe(answer.waited_seconds)
        self._seconds.labels(model_id).observe(answer.seconds)
        if answer.woken is not Woken.NONE:
            self._woken.labels(model_id, answer.woken).inc()
        if ttft_seconds is not None:
            self._ttft.labels(model_id).observe(ttft_seconds)
        if goals is not None and goals.ttft_seconds is not None:
            is_met = ttft_seconds is not None and ttft_seconds <= goals.ttft_seconds
            met, missed = (each.labels(model_id, "ttft") for each in (self._met, self._missed))
            (met if is_met else missed).inc()  # both are there: their shares can be computed

    def refused(self, model_id: str | None, code: str) -> None:
        """See `Observer.refused`."""
        del model_id  # a client wrote it
        self._refused.labels(code).inc()

    def cancelled(self, where: Where) -> None:
        """See `Observer.cancelled`."""
        self._cancelled.labels(where).inc()

    def late(self, model_id: str) -> None:
        """Count a request that went to the late ones of its line."""
        self._late.labels(model_id).inc()

    def changed(self, model_id: str, before: str, after: str) -> None:
        """Count a change of a model's state."""
        self._transitions.labels(model_id, before, after).inc()

    def started(self, model_id: str, seconds: float) -> None:
        """Count an engine that started, and what it took."""
        self._starts.labels(model_id).observe(seconds)

    def evicted(self, model_id: str, what_for: str) -> None:
        """Count an engine that was stopped: for a `start`, for `memory`, or for being `idle`."""
        self._evictions.labels(model_id, what_for).inc()

    def moved(self, model_id: str) -> None:
        """Count an engine that moved to another device."""
        self._moves.labels(model_id).inc()

    def adopted(self) -> None:
        """Count an engine of an earlier gateway that was kept."""
        self._adopted.inc()

    def reload_failed(self) -> None:
        """Count a file with a mistake."""
        self._reload_failures.inc()


class _Now(Collector):
    """What is read at each scrape."""

    def __init__(
        self,
        models: Callable[[], Sequence[ModelRow]],
        devices: Callable[[], Sequence[DeviceRow]],
    ) -> None:
        self._models = models
        self._devices = devices

    def describe(self) -> Iterator[Metric]:
        """Yield nothing: at its registration there are no models to ask yet."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Yield every gauge."""
        rows = self._models()
        state = GaugeMetricFamily(PREFIX + "state", "1 for the state.", labels=["model", "state"])
        for row in rows:
            for name in STATES:
                state.add_metric([row.id, name], float(row.state == name))
        yield state
        for name, (text, value) in MODEL_GAUGES.items():
            family = GaugeMetricFamily(PREFIX + name, text, labels=["model"])
            for row in rows:
                family.add_metric([row.id], value(row))
            yield family
        devices = self._devices()
        for name, (text, read) in DEVICE_GAUGES.items():
            family = GaugeMetricFamily(PREFIX + name, text, labels=["device"])
            for device in devices:
                family.add_metric([device.id], read(device))
            yield family
