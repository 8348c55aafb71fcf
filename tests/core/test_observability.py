"""The examples for Prometheus and Grafana name metrics that there are."""

import json
import re
from pathlib import Path

from kvcached_core.cli.metrics import exposition

EXAMPLES = Path(__file__).parents[2] / "examples" / "observability"
NAME = re.compile(r"kvcached_[a-z_]+")


def exported(tmp_path: Path) -> set[str]:
    lines = exposition(tmp_path).splitlines()
    families = {line.split()[2]: line.split()[3] for line in lines if line.startswith("# TYPE")}
    return set(families)


def test_the_dashboard_shows_metrics_that_there_are(tmp_path: Path) -> None:
    dashboard = json.loads((EXAMPLES / "grafana-dashboard.json").read_text())
    used = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in NAME.findall(target["expr"])
    }
    assert len(used) > 10
    assert used <= exported(tmp_path)


def test_the_alerts_watch_metrics_that_there_are(tmp_path: Path) -> None:
    text = (EXAMPLES / "alerts.yml").read_text()
    expressions = [line for line in text.splitlines() if line.strip().startswith("expr:")]
    assert len(expressions) == text.count("- alert:") == 4
    used = {name for line in expressions for name in NAME.findall(line)}
    assert used
    assert used <= exported(tmp_path)
