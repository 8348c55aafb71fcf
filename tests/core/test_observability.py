"""The examples for Prometheus and Grafana name metrics and labels that there are, and keep."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvcached_core.cli.metrics import exposition
from kvcached_core.config import Config
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.opening import ledger_directory
from kvcached_core.ledger.policy import Policy
from kvcached_core.units import GIB
from kvcached_core.weights.host_tier import HOST, HostTier, TierCounts
from kvcached_gateway.admin.metrics import Metrics
from kvcached_gateway.admin.views import DeviceRow, ModelRow
from kvcached_gateway.lease import Woken
from kvcached_gateway.observe import Answer
from kvcached_gateway.settings.config import ModelSettings, ServiceClass, Settings

EXAMPLES = Path(__file__).parents[2] / "examples" / "observability"
NAME = re.compile(r"kvcached_[a-z_]+")
# What a Prometheus that is set up as by default says of who it scraped; labels of the same name
# in what it reads are renamed (`honor_labels: false`).
OF_THE_TARGET = {"instance": "127.0.0.1:9410", "job": "kvcached"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("KVCACHED_DIR", str(tmp_path / "kv"))
    with Ledger(ledger_directory(tmp_path / "kv") / "host.ledger", GIB) as ledger:
        ledger.register(name="llama", engine="vLLM 0.32.0", policy=Policy(GIB // 2))
        config = Config(dir=ledger.path.parent, host_budget=GIB)
        tier = HostTier.reserve(config, "llama", GIB // 2, setting="--kv-offloading-size")
        tier.note([TierCounts(HOST)])
        yield ledger.path.parent
        tier.close()


def gateway_exposition() -> str:
    """Return what a gateway says to whom everything has happened once."""
    settings = Settings(
        path=Path("models.yaml"),
        classes={"chat": ServiceClass(name="chat", ttft_seconds=1.0)},
        models={"llama": ModelSettings(id="llama", class_name="chat")},
    )
    rows = [ModelRow("llama", "warm")]
    metrics = Metrics(lambda: settings, lambda: rows, lambda: [DeviceRow("host", GIB, GIB)])
    for ttft in (0.5, 1.5):
        metrics.answered(Answer("llama", None, 200, 0.1, ttft, 2.0, Woken.NONE))
    metrics.refused(None, "queue_full")
    metrics.cancelled("line")
    metrics.late("llama")
    metrics.changed("llama", "cold", "starting")
    metrics.started("llama", 30.0)
    metrics.evicted("llama", "start")
    metrics.moved("llama")
    return metrics.exposition()


def scraped(folder: Path) -> dict[str, dict[str, str]]:
    """Return the labels that each metric has once Prometheus has read it."""
    return {
        sample.name: {
            **{
                f"exported_{name}" if name in OF_THE_TARGET else name: value
                for name, value in sample.labels.items()
            },
            **OF_THE_TARGET,
        }
        for text in (exposition(folder), gateway_exposition())
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def dashboard_targets() -> list[dict[str, str]]:
    dashboard = json.loads((EXAMPLES / "grafana-dashboard.json").read_text())
    return [target for panel in dashboard["panels"] for target in panel.get("targets", ())]


def alerts() -> str:
    return (EXAMPLES / "alerts.yml").read_text()


def test_an_instance_keeps_its_name_when_it_is_scraped(folder: Path) -> None:
    labels = scraped(folder)
    of_instances = {name for name, found in labels.items() if "engine_instance" in found}
    of_devices = {name for name, found in labels.items() if "engine" in found}
    assert len(of_devices) > 10
    assert len(of_instances - of_devices) > 6
    for name in of_instances:
        assert labels[name]["engine_instance"] == "llama"
    for name in of_devices:
        assert labels[name]["device"] == "host"
    assert not [name for found in labels.values() for name in found if name.startswith("exported_")]


def test_the_dashboard_shows_metrics_that_there_are(folder: Path) -> None:
    labels = scraped(folder)
    used = {name for target in dashboard_targets() for name in NAME.findall(target["expr"])}
    assert len(used) > 10
    assert used <= set(labels)


def test_the_dashboard_names_its_lines_by_labels_that_there_are(folder: Path) -> None:
    labels = scraped(folder)
    for target in dashboard_targets():
        for metric in NAME.findall(target["expr"]):
            selected = re.findall(r"(\w+)=[~\"]", target["expr"])
            shown = re.findall(r"{{(\w+)}}", target["legendFormat"])
            assert {*selected, *shown} <= set(labels[metric]) - set(OF_THE_TARGET)


def test_the_dashboard_shows_all_that_is_said_of_tiers(folder: Path) -> None:
    of_tiers = {name for name in scraped(folder) if name.startswith("kvcached_offload_")}
    shown = {name for target in dashboard_targets() for name in NAME.findall(target["expr"])}
    assert len({name for name in of_tiers if not name.endswith("_created")} - shown) == 0
    assert len(of_tiers) > 6


def test_the_alerts_watch_metrics_and_name_labels_that_there_are(folder: Path) -> None:
    labels = scraped(folder)
    rules = alerts().split("- alert:")[1:]
    for rule in rules:
        (expression,) = re.findall(r"expr: (.*)", rule)
        metrics = NAME.findall(expression)
        assert metrics
        for metric in metrics:
            assert set(re.findall(r"\$labels\.(\w+)", rule)) <= set(labels[metric])
        is_of_an_instance = "engine" in labels[metrics[0]]
        assert not is_of_an_instance or "$labels.engine_instance" in rule
