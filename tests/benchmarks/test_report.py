"""The report, from records made by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
from multi_model.client import Record, write_records
from multi_model.fleet import Samples
from multi_model.report import write_report

KEY = "ramp-P=2-2-models"
GIB = 2**30


def records(ttft_seconds: float) -> list[Record]:
    return [
        Record(
            model=number % 2,
            due_seconds=number / 10,
            num_in=8,
            num_out=11,
            num_tokens=11,
            ttft_seconds=ttft_seconds,
            last_seconds=ttft_seconds + 0.1,
        )
        for number in range(20)
    ]


@pytest.fixture
def summary(tmp_path: Path) -> Any:
    for mode, ttft_seconds in (("alone", 0.1), ("static", 2.0), ("elastic", 0.2)):
        (tmp_path / mode).mkdir()
        write_records(tmp_path / mode / f"{KEY}.csv", records(ttft_seconds))
    samples = Samples(["m0", "m1"], [0.0, 1.0], [[GIB, 0], [GIB, GIB]], [3 * GIB, 3 * GIB])
    samples.write(tmp_path / "elastic" / f"{KEY}-memory.csv")
    fact = {"num_requests": 20, "num_models": 2, "name": "ramp P=2"}
    (tmp_path / "run.json").write_text(json.dumps({KEY: fact, "pool_bytes": 4 * GIB}))
    write_report(tmp_path)
    return json.loads((tmp_path / "summary.json").read_text())


def test_static_is_compared_with_elastic(summary: Any) -> None:
    ratios = summary["workloads"][KEY]["ratios"]
    assert ratios["static_to_elastic_mean_ttft"] == pytest.approx(10)
    assert ratios["static_to_elastic_mean_tpot"] == pytest.approx(1)
    assert summary["ramp"] == [{"peak": 2.0, "mean_ttft": 10.0, "p99_ttft": pytest.approx(10)}]


def test_the_most_models_are_told_for_each_scale(summary: Any) -> None:
    most = summary["models_at_99_percent"]
    assert most["ramp P=2 within 5x"] == {"alone": 2, "static": 0, "elastic": 2}
    assert most["ramp P=2 within 20x"] == {"alone": 2, "static": 2, "elastic": 2}


def test_memory_is_told_from_its_samples(summary: Any) -> None:
    elastic = summary["workloads"][KEY]["modes"]["elastic"]
    assert (elastic["peak_bytes"], elastic["mean_bytes"]) == (2 * GIB, 1.5 * GIB)


def test_all_pictures_are_drawn_from_the_raw_records(summary: Any, tmp_path: Path) -> None:
    assert summary
    page = (tmp_path / "report.html").read_text()
    for picture in ("rates", "latency", "attainment", "memory"):
        assert f'alt="{KEY}-{picture}"' in page
