"""The whole pipeline on host memory: real engines, a schedule, records, a report."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.waiting import PATIENCE_SECONDS
from multi_model.client import read_records

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
MODES = ("alone", "static", "elastic")


def run(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "run", "multi_model_host", *words],
        cwd=ROOT,
        env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = tmp_path_factory.mktemp("results")
    run("--results", str(results))
    return results / "multi_model" / "host"


@pytest.fixture(scope="module")
def summary(folder: Path) -> Any:
    return json.loads((folder / "summary.json").read_text())


def test_a_dry_run_says_what_it_would_do_and_does_nothing(tmp_path: Path) -> None:
    said = run("--results", str(tmp_path), "--", "--dry-run")
    assert all(word in said for word in (*MODES, "8 requests", "KVCACHED_HOST_POOL"))
    assert not (tmp_path / "multi_model").exists()


@pytest.mark.every_release
def test_every_request_of_every_mode_is_recorded_and_completed(folder: Path, summary: Any) -> None:
    for key, found in summary["workloads"].items():
        assert set(found["modes"]) == set(MODES)
        for mode in MODES:
            records = read_records(folder / mode / f"{key}.csv")
            assert len(records) == found["num_requests"]
            assert not [record.error for record in records if record.error]


@pytest.mark.every_release
def test_the_summary_has_all_figures(summary: Any) -> None:
    for found in summary["workloads"].values():
        for mode in ("static", "elastic"):
            figures = found["modes"][mode]
            assert {"num", "mean", "p50", "p95"} == set(figures["ttft_ms"])  # too few for a p99
            assert len(figures["attainment"]) == 30
            assert figures["goodput_per_second"] >= 0
            assert figures["peak_bytes"] > 0
        static, elastic = (found["modes"][mode] for mode in ("static", "elastic"))
        assert elastic["peak_bytes"] < static["peak_bytes"]
    assert [point["peak"] for point in summary["ramp"]] == [2.0]
    assert summary["machine"]["num_cores"]
    assert [check["rate"] for check in summary["cross_check"]] == [1.0]


@pytest.mark.every_release
def test_the_report_is_one_page_with_its_pictures_inside(folder: Path, summary: Any) -> None:
    page = (folder / "report.html").read_text()
    for found in summary["workloads"].values():
        assert found["name"] in page
    for picture in ("latency", "attainment", "rates", "memory"):
        assert f'-{picture}" src="data:image/png;base64,' in page
    assert 'src="http' not in page
    assert "vllm bench serve" in page


@pytest.mark.every_release
def test_models_take_turns_in_every_mode_that_has_turns_and_behind_the_gateway(
    tmp_path: Path,
) -> None:
    modes = ("gateway", "sleep-swap", "swap")
    words = ("--modes", *modes, "--workloads", "constant:0.5", "--seconds", "4")
    run("--results", str(tmp_path), "--", *words)
    folder = tmp_path / "multi_model" / "host"
    summary = json.loads((folder / "summary.json").read_text())
    ((key, found),) = summary["workloads"].items()
    assert set(found["modes"]) == set(modes)
    for mode in modes:
        records = read_records(folder / mode / f"{key}.csv")
        assert len(records) == 4
        assert not [record.error for record in records if record.error]
    assert found["modes"]["swap"]["num_turns"] >= 1
    assert found["modes"]["sleep-swap"]["num_turns"] >= 1
    assert found["modes"]["gateway"]["peak_bytes"] > 0
    assert {line["other"] for line in found["compared"]} == {"sleep-swap", "swap"}


def engines() -> list[int]:
    """Return the processes whose ledger is that of a run with two models."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if re.search(rb"KVCACHED_DIR=[^\0]*/2-models/", path.read_bytes()):
                found.append(int(path.parent.name))
    return found


def test_an_interrupted_run_takes_its_engines_along(tmp_path: Path) -> None:
    assert engines() == []  # what earlier runs started is gone
    command = [sys.executable, "-m", "benchmarks", "run", "multi_model_host"]
    command += ["--results", str(tmp_path), "--", "--modes", "static"]
    with (tmp_path / "log").open("w") as log:
        running = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        )
    while len(engines()) < 2:
        assert running.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.1)  # another process: nothing tells when it has started its own
    os.killpg(running.pid, signal.SIGINT)
    assert running.wait(PATIENCE_SECONDS) != 0
    assert engines() == []
