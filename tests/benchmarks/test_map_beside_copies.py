"""Mapping beside copies: what comes in which order, and what a rehearsal records."""

import json
import sys
from pathlib import Path

import map_beside_copies
import pytest
from helpers.weight_ranks import Recorder
from map_beside_copies import ALONE, BESIDE, FIRST, IN_TURN, Mapping, Way, all_ways

from kvcached_core.memory.vmm.host import HostBackend
from kvcached_core.units import MIB

PAGE = 64 * MIB
EACH = {
    ALONE: ["map", "map", "finish_copies"],
    IN_TURN: ["map", "copy_in", "map", "copy_in", "finish_copies"],
    FIRST: ["map", "map", "copy_in", "copy_in", "finish_copies"],
    BESIDE: ["copy_in", "copy_in", "map", "map", "finish_copies"],
}


@pytest.mark.parametrize("order", EACH)
def test_pages_and_copies_come_in_the_order_of_the_way(order: str) -> None:
    recorder = Recorder(HostBackend())
    mapping = Mapping(recorder, 2 * PAGE)
    for _ in range(2):  # what was mapped is unmapped again
        recorder.verbs.clear()
        found = mapping.do(Way(order, PAGE, 0 if order == ALONE else PAGE))
        done = [verb for verb in recorder.verbs if verb in ("map", "copy_in", "finish_copies")]
        assert done == EACH[order]
        assert ("copied_seconds" in found) == (order != ALONE)


def test_a_rehearsal_records_each_way_as_often_as_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "map.json"
    arguments = ["map_beside_copies.py", "--tiny", "--number", "2", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", arguments)
    map_beside_copies.main()
    results = json.loads(path.read_text())
    assert list(results["ways"]) == [str(way) for way in all_ways()]
    counts = {len(each) for row in results["ways"].values() for each in row.values()}
    assert counts == {2}
    assert "in turn, pages of 16 MiB, copies of 2 MiB" in capsys.readouterr().out
