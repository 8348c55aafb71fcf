"""What the core's command line shows of a gateway's models."""

from pathlib import Path

from helpers.gateway_steering import admin_running

from kvcached_gateway.admin.naming import instances
from kvcached_gateway.admin.views import ModelRow


def test_a_model_has_its_instance_and_who_waits_for_it(tmp_path: Path) -> None:
    rows = (
        ModelRow("org/one", "busy", "org-one", num_waiting=2, oldest_wait_seconds=1.5),
        ModelRow("two", "cold", "two"),
        ModelRow("elsewhere", "remote"),
    )
    with admin_running(tmp_path, *rows):
        one, two = instances(tmp_path)
    assert (one.name, one.instance) == ("org/one", "org-one")
    assert one.cells == {"state": "busy", "queue": "2", "wait": "1.5s"}
    assert two.cells == {"state": "cold", "queue": "", "wait": ""}
    assert two.state == "cold"


def test_where_no_gateway_runs_nothing_is_said(tmp_path: Path) -> None:
    assert instances(tmp_path) == []
