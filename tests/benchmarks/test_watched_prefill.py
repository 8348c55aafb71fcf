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
    arguments += ["--ways", "large=16MiB/512MiB", "small=1MiB/2MiB", "--trace", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        watched_prefill.main()
    assert ended.value.code == 0
    results = json.loads(path.read_text())
    assert {name: len(rounds) for name, rounds in results["ways"].items()} == {
        "large": 2,
        "small": 2,
    }
    assert {file.name for file in tmp_path.glob("*.gz")} == {"large.json.gz", "small.json.gz"}
    for found in (one for rounds in results["ways"].values() for one in rounds):
        together = found["together"]
        assert len(together["pages"]["device"]) == results["num_pages"]
        (begun,), (ended_at,) = (together[what]["device"] for what in ("begun", "ended"))
        points = together["points"]["device"]
        assert len(points) > 1
        assert [begun, *points, ended_at] == sorted([begun, *points, ended_at])
        assert not {"pages", "points"} & (found["there"].keys() | found["behind"].keys())
    assert "1 different answers" in capfd.readouterr().out
