"""The gateway's commands: what they say, and how they end."""

import json
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import typer
from helpers.gateway_steering import Written, admin_running
from typer.testing import CliRunner

from kvcached_core.errors import ConfigError, KVCachedError
from kvcached_gateway import commands
from kvcached_gateway.admin import doctor
from kvcached_gateway.admin.client import NoGatewayError
from kvcached_gateway.admin.views import ModelRow
from kvcached_gateway.commands import show_log
from kvcached_gateway.settings.durations import duration

ROOT = Path(__file__).parents[2]
ENTRIES = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
OURS = {
    name: value
    for name, value in ENTRIES["kvcached.commands"].items()
    if value.startswith("kvcached_gateway")
}
ONE = ModelRow(
    "one",
    "busy",
    "one",
    since_seconds=90.0,
    reason="a request came",
    devices=("host",),
    num_leases=3,
    num_waiting=2,
    oldest_wait_seconds=1.5,
    num_starts=1,
    start_seconds=31.0,
    is_pinned=True,
)
Run = Callable[..., "tuple[int, str, BaseException | None]"]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def run(name: str, *words: str) -> tuple[int, str, BaseException | None]:
        app = typer.Typer()
        app.command(name)(getattr(commands, name))
        result = CliRunner().invoke(app, [*words, "--dir", str(tmp_path)])
        return result.exit_code, result.output, result.exception

    return run


@pytest.fixture
def written(tmp_path: Path) -> Iterator[Written]:
    log = tmp_path / "one.log"
    log.write_text("".join(f"line {number}\n" for number in range(200)))
    failed = ModelRow("bad", "failed", failure="many words\nno such file", retry_seconds=5.0)
    with admin_running(tmp_path, ModelRow(**{**vars(ONE), "log": str(log)}), failed) as found:
        yield found[0]


def test_every_command_and_finding_that_we_add_can_be_loaded() -> None:
    assert set(OURS) == {
        *("serve", "models", "warm", "stop", "pin", "unpin", "reload", "explain", "logs"),
    }
    for name, value in OURS.items():
        assert EntryPoint(name, value, "kvcached.commands").load() is getattr(commands, name)
    value = ENTRIES["kvcached.doctor"]["gateway"]
    assert EntryPoint("gateway", value, "kvcached.doctor").load() is doctor.findings


@pytest.mark.usefixtures("written")
def test_models_are_shown_with_what_matters_of_each(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    code, told, _ = run("models")
    assert code == 0
    header, one, bad = told.splitlines()
    assert header.split() == list(commands.COLUMNS)
    assert " ".join(one.split()) == "one (pinned) busy 90s host 3 2 1.5s 1 31s a request came"
    assert bad.rstrip().endswith("no such file")


@pytest.mark.usefixtures("written")
def test_models_are_json_for_programs(run: Run) -> None:
    rows = json.loads(run("models", "--json")[1])
    assert rows[0]["oldest_wait_seconds"] == 1.5
    assert rows[0]["devices"] == ["host"]


def test_verbs_end_as_their_model_does(run: Run, written: Written) -> None:
    assert run("warm", "one")[:2] == (0, "one will warm\n")
    assert run("pin", "one")[:2] == (0, "one will pin\n")
    assert run("unpin", "one")[:2] == (0, "one will unpin\n")
    assert written.steered == [("one", "warm"), ("one", "pin"), ("one", "unpin")]
    written.rest.clear()
    code, told, _ = run("warm", "one", "--timeout", "0.01")
    assert (code, told) == (3, "one will warm\none is still warm\n")


@pytest.mark.parametrize("seconds", ["-1", "inf", "nan", "1e300"])
def test_a_time_that_no_clock_counts_is_wrong_usage(
    run: Run, written: Written, seconds: str
) -> None:
    assert run("stop", "one", "--timeout", seconds)[0] == 2
    assert not written.steered


def test_a_refusal_and_a_failure_are_errors_with_the_reason(run: Run, written: Written) -> None:
    assert str(run("stop", "one")[2]) == "'one' is pinned"
    written.becomes = "failed"
    assert str(run("warm", "bad")[2]) == "bad failed: many words\nno such file"


@pytest.mark.usefixtures("written")
def test_a_model_is_explained(run: Run) -> None:
    assert run("explain", "one")[:2] == (0, "one is warm: a request came\n")


def test_a_reload_says_what_changed(run: Run, written: Written) -> None:
    assert run("reload")[:2] == (0, "added one\n")
    written.reloaded = ConfigError("models.yaml, line 3: no")
    assert str(run("reload")[2]) == "models.yaml, line 3: no"


@pytest.mark.usefixtures("written")
def test_the_last_lines_of_a_log_are_shown(run: Run) -> None:
    assert run("logs", "one", "-n", "2")[:2] == (0, "line 198\nline 199\n")
    assert "'bad' has no log" in str(run("logs", "bad")[2])
    assert "there is no model 'two'; there are one, bad" in str(run("logs", "two")[2])


def test_a_log_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log"
    path.write_text("old\n")
    written: list[bytes] = []
    has_new = threading.Event()

    def write(content: bytes) -> None:
        if content:
            written.append(content)
        if written == [b"old\n"]:
            with path.open("a") as file:
                file.write("new\n")
        elif len(written) > 1:
            has_new.set()
            raise KeyboardInterrupt

    monkeypatch.setattr(commands, "_write", write)
    with pytest.raises(KeyboardInterrupt):
        show_log(path, 10, is_followed=True)
    assert written == [b"old\n", b"new\n"]
    assert has_new.is_set()


@pytest.mark.parametrize("name", sorted(set(OURS) - {"serve"}))
def test_where_no_gateway_runs_each_command_says_so(run: Run, name: str) -> None:
    words = [] if name in {"models", "reload"} else ["one"]
    assert isinstance(run(name, *words)[2], NoGatewayError)


def test_a_file_is_checked_without_what_starts_engines(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "kvcached_gateway.serve", None)
    file = tmp_path / "models.yaml"
    file.write_text("listen: 127.0.0.1:0")
    code, told, _ = run("serve", str(file), "--check")
    assert code == 0
    assert f"ok    {file}: 0 models, 0 of them with engines here" in told
    file.write_text("listen: 127.0.0.1:0\nkeys_file: none.yaml")
    code, told, _ = run("serve", str(file), "--check")
    assert code == 1
    (failed,) = [line for line in told.splitlines() if line.startswith("FAIL  ")]
    assert f"{tmp_path / 'none.yaml'}" in failed
    file.write_text("lisen: a:1")
    error = run("serve", str(file), "--check")[2]
    assert isinstance(error, ConfigError)


def test_what_is_not_installed_is_named(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "kvcached_gateway.serve", None)
    error = run("serve", str(tmp_path / "models.yaml"))[2]
    assert isinstance(error, KVCachedError)
    assert "pip install 'kvcached-elastic[gateway]'" in str(error)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0s"),
        (9.94, "9.9s"),
        (31, "31s"),
        (119, "119s"),
        (300, "5m"),
        (7200, "2h"),
        (1e6, "12d"),
    ],
)
def test_times_are_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text
