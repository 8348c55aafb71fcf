"""A program beside two real vLLM servers whose caches and weights fill the pool, 20 times."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.every_release]

ROOT = Path(__file__).parents[2]
NUM_ROUNDS, NUM_LARGE_ROUNDS = 20, 3


@pytest.mark.timeout(1500)
def test_it_has_all_of_its_memory_each_time_and_both_servers_answer_as_always(
    tmp_path: Path,
) -> None:
    record = tmp_path / "programs.json"
    words = ["--tiny", "--number", str(NUM_ROUNDS), "--large-number", str(NUM_LARGE_ROUNDS)]
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "programs.py", "--json", record, *words],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    found = json.loads(record.read_text())
    assert (found["failed"], found["wrong"]) == (0, 0)
    rounds = [one for part in found["parts"] for one in part["rounds"]]
    assert [one["has_all"] for one in rounds] == [True] * (NUM_ROUNDS + NUM_LARGE_ROUNDS), (
        done.stdout
    )
    small, large = (part["rounds"] for part in found["parts"])
    assert all(one["given_cached_bytes"] > 0 for one in small)
    assert all(one["given_weights_bytes"] > 0 for one in large)
