"""How benchmarks are called, and the records that they write."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.benchmark_scripts import BENCHMARKS
from parts.record import Record, command_line, shown


def test_a_record_has_all_that_was_added_in_a_folder_that_it_makes(tmp_path: Path) -> None:
    path = tmp_path / "new" / "found.json"
    record = Record(path)
    record.add(machine="a", number=1)
    record.add(number=2, text="b")
    assert json.loads(path.read_text()) == {"machine": "a", "number": 2, "text": "b"}
    assert json.loads(shown(record.results)) == {"number": 2, "text": "b"}
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_who_reads_a_record_never_finds_a_part_of_it(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    record = Record(path)
    record.add(number=1)
    with path.open() as before:  # as one who has opened it and not read yet
        record.add(number=2)
        assert json.load(before) == {"number": 1}


def test_a_rehearsal_is_offered_where_there_is_one(tmp_path: Path) -> None:
    words = ["--json", str(tmp_path / "found.json")]
    assert command_line(None, can_rehearse=True).parse_args([*words, "--tiny"]).tiny
    with pytest.raises(SystemExit):
        command_line(None).parse_args([*words, "--tiny"])
    with pytest.raises(SystemExit):
        command_line(None).parse_args([])


ENDED = """
import os, signal
from parts.record import begin_record, command_line
record = begin_record(command_line(None, can_rehearse=True).parse_args())
try:
    os.kill(os.getpid(), signal.SIGTERM)
    signal.pause()
finally:
    record.add(is_cleaned_up=True)
"""


def test_a_rehearsal_names_its_machine_and_a_signal_lets_it_clean_up(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    words = [sys.executable, "-c", ENDED, "--json", str(path), "--tiny"]
    done = subprocess.run(words, cwd=BENCHMARKS, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"ended by {signal.SIGTERM.name}"
    found = json.loads(path.read_text())
    assert found["machine"]["python"]
    assert found["is_cleaned_up"]
