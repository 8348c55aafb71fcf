"""A real Prometheus reads our metrics and our alerts: make prometheus-check.

It fails where Debian's `prometheus`, which has promtool with it, is not installed.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import KVCACHED
from helpers.waiting import await_that

from kvcached_core.config import Config
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.opening import ledger_directory
from kvcached_core.ledger.policy import Policy
from kvcached_core.units import GIB, MIB
from kvcached_core.weights.host_tier import HOST, HostTier, TierCounts

EXAMPLES = Path(__file__).parents[2] / "examples" / "observability"
CONFIGURATION = """
global: {{scrape_interval: 200ms, evaluation_interval: 200ms}}
rule_files: [{rules}]
scrape_configs:
- job_name: kvcached
  static_configs: [{{targets: ["{target}"]}}]
"""
# Each alert over fifteen minutes of one sample a minute, as it is once it is scraped.
ALERT_TEST = """
rule_files: [{rules}]
evaluation_interval: 1m
tests:
- interval: 1m
  input_series:
  - series: '{series}'
    values: '{values}'
  alert_rule_test:
  - eval_time: 14m
    alertname: {alert}
    exp_alerts:
    - exp_labels: {{severity: warning, {labels}}}
      exp_annotations:
        summary: "{summary}"
        description: "{description}"
"""

pytestmark = pytest.mark.prometheus


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tool(name: str) -> str:
    found = shutil.which(name)
    assert found, f"{name} is not installed; apt-get install prometheus"
    return found


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[str]:
    """Yield the address of a Prometheus that scrapes the metrics of two instances."""
    server, target = (f"127.0.0.1:{free_port()}" for _ in range(2))
    configuration = tmp_path / "prometheus.yml"
    configuration.write_text(
        CONFIGURATION.format(rules=EXAMPLES / "alerts.yml", target=target), encoding="utf-8"
    )
    commands = [
        [KVCACHED, "metrics", "--port", target.rpartition(":")[2], "--dir", tmp_path / "kv"],
        [
            *(tool("prometheus"), f"--config.file={configuration}"),
            *(f"--storage.tsdb.path={tmp_path / 'data'}", f"--web.listen-address={server}"),
        ],
    ]
    with ExitStack() as stack:
        ledger = stack.enter_context(Ledger(ledger_directory(tmp_path / "kv") / "host.ledger", GIB))
        config = Config(dir=ledger.path.parent, host_budget=GIB)
        for name in ("llama", "qwen"):
            row = ledger.register(
                name=name, engine="vLLM 0.32.0", page_bytes=MIB, policy=Policy(GIB // 2)
            )
            ledger.promise(row, 8 * MIB, MIB)
            ledger.settle(row, mapped_bytes=8 * MIB, used_bytes=2 * MIB, cached_bytes=MIB)
            tier = HostTier.reserve(config, name, GIB // 4, setting="--kv-offloading-size")
            stack.callback(tier.close)
            tier.note([TierCounts(HOST)])
        log = stack.enter_context((tmp_path / "prometheus.log").open("wb"))
        for command in commands:
            process = stack.enter_context(
                subprocess.Popen(command, stdout=log, stderr=log, env=os.environ)
            )
            stack.callback(process.terminate)
        await_that(lambda: bool(query(server, "kvcached_resident_bytes")))
        yield server


def query(server: str, expression: str) -> list[dict[str, Any]]:
    words = urllib.parse.urlencode({"query": expression})
    try:
        with urllib.request.urlopen(f"http://{server}/api/v1/query?{words}") as answer:
            found = json.load(answer)
    except OSError:
        return []
    return list(found["data"]["result"])


def test_instances_keep_their_names_and_every_panel_has_data(prometheus: str) -> None:
    found = query(prometheus, "kvcached_resident_bytes")
    assert {row["metric"]["engine_instance"] for row in found} == {"llama", "qwen"}
    assert not [name for row in found for name in row["metric"] if name.startswith("exported_")]

    dashboard = json.loads((EXAMPLES / "grafana-dashboard.json").read_text())
    expressions = [
        target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())
    ]
    # No gateway runs here.
    for expression in (each for each in expressions if "kvcached_gateway_" not in each):
        filled = re.sub(r"\$(device|engine_instance)", ".*", expression)
        await_that(lambda words=filled: bool(query(prometheus, words)))


@pytest.mark.parametrize(
    ("alert", "metric", "values"),
    [
        ("KVCachedInstanceWaitsForMemory", "kvcached_waiting_bytes", "1x20"),
        ("KVCachedInstanceIsFull", "kvcached_pressure", "1x20"),
        ("KVCachedManyRefusals", "kvcached_refusals_total", "0+1200x20"),
    ],
)
def test_an_alert_names_the_instance_and_not_the_exporter(
    tmp_path: Path, alert: str, metric: str, values: str
) -> None:
    rules = (EXAMPLES / "alerts.yml").read_text()
    (rule,) = (part for part in rules.split("- alert: ") if part.startswith(alert + "\n"))
    (summary,) = re.findall(r'summary: "(.*)"', rule)
    description = re.split(r"description:(?: >-)?", rule)[1].split("- alert")[0]
    labels = {
        "device": "host",
        "engine_instance": "llama",
        "engine": "vLLM",
        "instance": "127.0.0.1:9410",
        "job": "kvcached",
    }
    for name, value in labels.items():
        summary = summary.replace("{{ $labels.%s }}" % name, value)  # noqa: UP031  braces are Go's
    series = ", ".join(f'{name}="{value}"' for name, value in labels.items())
    assert "llama" in summary
    file = tmp_path / "alerts_test.yml"
    file.write_text(
        ALERT_TEST.format(
            rules=EXAMPLES / "alerts.yml",
            series=f"{metric}{{{series}}}",
            values=values,
            alert=alert,
            labels=series.replace('="', ': "'),
            summary=summary,
            description=" ".join(description.split()),
        )
    )
    done = subprocess.run(
        [tool("promtool"), "test", "rules", file], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
