"""Two equally busy servers on one pool, beside halves of it: a rehearsal counts all turns."""

import json
import sys
from pathlib import Path

import equal_servers
import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.every_release]


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
