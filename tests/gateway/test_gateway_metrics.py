"""What Prometheus reads of the gateway."""

from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvcached_gateway.admin.metrics import STATES, Metrics
from kvcached_gateway.admin.views import DeviceRow, ModelRow
from kvcached_gateway.lease import Woken
from kvcached_gateway.observe import Answer, Observer
from kvcached_gateway.settings.config import ModelSettings, ServiceClass, Settings
from kvcached_gateway.state import State

ROW = ModelRow("one", "busy", num_leases=3, num_waiting=2, oldest_wait_seconds=1.5, is_pinned=True)
DEVICE = DeviceRow("host", 100, 25, ("one",), 0.5)
SETTINGS = Settings(
    path=Path("models.yaml"),
    classes={
        "chat": ServiceClass(name="chat", ttft_seconds=1.0),
        "batch": ServiceClass(name="batch"),
    },
    models={
        "one": ModelSettings(id="one", class_name="chat"),
        "two": ModelSettings(id="two"),
    },
)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(lambda: SETTINGS, lambda: [ROW], lambda: [DEVICE])


def answered(observer: Observer, model_id: str, *, name: str | None, ttft: float | None) -> None:
    observer.answered(Answer(model_id, name, 200, 0.25, ttft, 2.0, Woken.START))


def samples(metrics: Metrics) -> dict[str, float]:
    """Return each value by its name and labels, without the long name's beginning."""
    found = {}
    for family in text_string_to_metric_families(metrics.exposition()):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            found[f"{sample.name.removeprefix('kvcached_gateway_')}{{{labels}}}"] = sample.value
    return found


def test_models_and_devices_are_read_as_they_are_now(metrics: Metrics) -> None:
    found = samples(metrics)
    assert found["in_flight{model=one}"] == 3
    assert found["queued{model=one}"] == 2
    assert found["oldest_wait_seconds{model=one}"] == 1.5
    assert found["pinned{model=one}"] == 1
    assert found["device_free_bytes{device=host}"] == 25
    assert found["kv_pressure_ratio{device=host}"] == 0.5


def test_a_model_has_one_state_of_all(metrics: Metrics) -> None:
    found = {name: samples(metrics)[f"state{{model=one,state={name}}}"] for name in STATES}
    assert [name for name, value in found.items() if value] == ["busy"]


def test_the_states_are_those_that_a_model_has() -> None:
    assert {str(state) for state in State} | {"remote", "adapter"} == set(STATES)


def test_an_answer_is_counted_with_its_times(metrics: Metrics) -> None:
    answered(metrics, "one", name=None, ttft=0.5)
    found = samples(metrics)
    assert found["requests_total{class=chat,code=200,model=one}"] == 1
    assert found["queue_seconds_sum{model=one}"] == 0.25
    assert found["ttft_seconds_sum{model=one}"] == 0.5
    assert found["request_seconds_sum{model=one}"] == 2
    assert found["woken_requests_total{model=one,what=start}"] == 1


def test_goals_are_those_of_the_requests_class_or_else_of_its_models(metrics: Metrics) -> None:
    answered(metrics, "one", name=None, ttft=0.5)
    answered(metrics, "one", name="chat", ttft=1.5)
    answered(metrics, "one", name="batch", ttft=9.0)  # without a goal
    answered(metrics, "two", name=None, ttft=9.0)  # without a class
    answered(metrics, "two", name="chat", ttft=None)  # nothing came
    found = samples(metrics)
    assert found["slo_met_total{model=one,what=ttft}"] == 1
    assert found["slo_missed_total{model=one,what=ttft}"] == 1
    assert found["slo_missed_total{model=two,what=ttft}"] == 1
    assert found["slo_met_total{model=two,what=ttft}"] == 0  # there, for its share


def test_what_a_client_wrote_is_in_no_label(metrics: Metrics) -> None:
    metrics.refused("made up by a client", "model_not_found")
    answered(metrics, "one", name="made up by a client", ttft=0.1)
    assert "made up" not in metrics.exposition()
    assert samples(metrics)["refused_total{code=model_not_found}"] == 1


def test_what_the_controller_does_is_counted(metrics: Metrics) -> None:
    metrics.cancelled("line")
    metrics.late("one")
    metrics.changed("one", "warm", "busy")
    metrics.started("one", 30.0)
    metrics.evicted("one", "start")
    metrics.moved("one")
    metrics.adopted()
    metrics.reload_failed()
    found = samples(metrics)
    assert found["cancelled_total{where=line}"] == 1
    assert found["late_total{model=one}"] == 1
    assert found["transitions_total{from=warm,model=one,to=busy}"] == 1
    assert found["start_seconds_sum{model=one}"] == 30
    assert found["evictions_total{for=start,model=one}"] == 1
    assert found["moves_total{model=one}"] == 1
    assert found["adopted_total{}"] == 1
    assert found["reload_failures_total{}"] == 1
