"""Two equally busy servers on one pool, beside halves of it: a rehearsal counts all turns."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import equal_servers
import pytest
from parts.equal_asks import SIDES
from parts.hanging_up import ANSWERED


def test_a_turn_that_is_too_short_for_an_answer_counts_the_first_one_of_each_client(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def answer(*_: object) -> str:
        return ANSWERED

    monkeypatch.setattr(equal_servers, "ask", answer)
    servers: Any = {
        f"{equal_servers.HALVES}-{side}": SimpleNamespace(
            url="http://nobody", name=side, metric=lambda _: 0.0
        )
        for side in SIDES
    }
    found = equal_servers.Clients(servers, equal_servers.HALVES, 3).run(0.0)
    assert found["answers_of_each"] == [3, 3]


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.every_release
def test_a_rehearsal_counts_answers_and_what_was_found_in_each_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "equal.json"
    arguments = ["equal_servers.py", "--seconds", "5", "--clients", "4", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", arguments)
    equal_servers.main()
    (found,) = json.loads(path.read_text())["rounds"]
    assert len(found["turns"]) == len(equal_servers.TURNS)
    for turn in found["turns"]:
        assert turn["answers"] == sum(turn["answers_of_each"]) > 0
        assert {what.partition(" ")[2] for what in turn["all"]} <= {"answered", "aborted"}
        assert turn["asked_tokens"] > 0
        assert 0 <= turn["hit_rate"] <= 1
    assert "bar 0.98" in capsys.readouterr().out
