"""Schedules that are replayed alone, and those that others stand for."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from multi_model import replays
from multi_model.client import Record
from multi_model.options import parser
from multi_model.replays import ANSWER_SECONDS, TOKEN_SECONDS, closed_up, play_alone
from multi_model.workloads import Request, Workload
from rich.progress import Progress

FLEET: Any = SimpleNamespace(targets=["the one server"])
# Each model is asked at moments of its own.
WORKLOAD = Workload(
    "asked",
    5,
    tuple(
        Request(model * 0.1 + 2.0**model * n, model, 10 + model, 5)
        for n in range(3)
        for model in range(5)
    ),
)


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Yield the prompts' lengths of each schedule that was replayed."""
    found: list[int] = []
    seeds: set[int] = set()

    async def replay(workload: Workload, _targets: Any, *, seed: int, on_done: Any) -> list[Record]:
        seeds.add(seed)
        found.append(workload.requests[0].num_in)
        records = [Record(0, each.at_seconds, each.num_in, 5) for each in workload.requests]
        for record in records:
            on_done(record)
        return records

    monkeypatch.setattr(replays, "replay", replay)
    monkeypatch.setattr(replays, "QUIET_SECONDS", 0)
    yield found
    assert len(seeds) == len(found)  # no model finds another one's prompts in the cache


def lengths_by_model(records: list[Record]) -> dict[int, set[int]]:
    models = {record.model for record in records}
    return {model: {one.num_in for one in records if one.model == model} for model in models}


def test_every_model_of_a_shape_is_replayed(played: list[int]) -> None:
    found = play_alone(FLEET, WORKLOAD, [1, 3], Progress(disable=True))
    assert played == [11, 13]
    assert lengths_by_model(found) == {1: {11}, 3: {13}}


def test_the_first_models_stand_in_turn_for_those_that_are_not_replayed(played: list[int]) -> None:
    found = play_alone(FLEET, WORKLOAD, [0, 1, 2, 3, 4], Progress(disable=True), 2)
    assert played == [10, 11]
    assert lengths_by_model(found) == {0: {10}, 1: {11}, 2: {10}, 3: {11}, 4: {10}}
    assert len(found) == len(WORKLOAD.requests)


def test_a_model_that_nobody_asks_stands_for_none(played: list[int]) -> None:
    asked = tuple(each for each in WORKLOAD.requests if each.model not in {1, 4})
    workload = Workload("asked", 5, asked)
    found = play_alone(FLEET, workload, [0, 1, 2, 3, 4], Progress(disable=True), 2)
    assert played == [10, 12]
    assert lengths_by_model(found) == {0: {10}, 2: {12}, 3: {10}}


def test_only_time_in_which_nothing_is_answered_is_left_out() -> None:
    # The second comes while the first is answered, the third long after both, the last with it.
    asked = [Request(at, 3, 10, num_out) for at, num_out in ((7.0, 200), (8.0, 10), (50.0, 5))]
    asked.append(Request(50.25, 3, 10, 5))
    found = closed_up(asked)
    answered = ANSWER_SECONDS + 200 * TOKEN_SECONDS
    assert [one.at_seconds for one in found] == [0.0, 1.0, answered, answered + 0.25]
    assert {one.model for one in found} == {0}
    assert [one.num_out for one in found] == [200, 10, 5, 5]
    assert closed_up([]) == ()


def test_no_model_cannot_stand_for_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser("").parse_args(["--out", str(tmp_path), "--alone-models", "0"])
    assert "--alone-models: '0' is not a number above 0" in capsys.readouterr().err
