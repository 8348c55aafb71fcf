"""A prompt that is watched while weights come: a rehearsal sees every point and every page."""

import json
import sys
from pathlib import Path

import pytest
import watched_prefill

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.every_release]


def test_a_rehearsal_sees_when_each_layer_began_and_each_page_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "watched.json"
    arguments = ["watched_prefill.py", "--tiny", "--number", "2", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        watched_prefill.main()
    assert ended.value.code == 0
    results = json.loads(path.read_text())
    assert len(results["rounds"]) == 2
    for found in results["rounds"]:
        together = found["together"]
        assert len(together["pages"]["device"]) == results["num_pages"]
        (begun,), (ended_at,) = (together[what]["device"] for what in ("begun", "ended"))
        points = together["points"]["device"]
        assert len(points) > 1
        assert [begun, *points, ended_at] == sorted([begun, *points, ended_at])
        assert not {"pages", "points"} & (found["there"].keys() | found["behind"].keys())
    assert "1 different answers" in capfd.readouterr().out
