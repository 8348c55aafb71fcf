"""SGLang's own tree, controller and host pool over our pages, without a server.

Requests come and end while neighbours take memory and copies are open. What a request finds, on the
device or loaded from the host, is what was written for its tokens.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.hicache_copier_settings import UNMAPPED
from helpers.nursery import SGLANG_ENVIRON

pytestmark = [pytest.mark.sglang]

LONG = (pytest.mark.slow, pytest.mark.every_release)
SCRIPT = Path(__file__).parents[1] / "helpers" / "hicache_tree.py"


def run(**options: Any) -> "subprocess.CompletedProcess[str]":
    chosen = {"policy": "write_through", "seed": 1, "num_turns": 40} | options
    paths = filter(None, [str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH")])
    return subprocess.run(
        [sys.executable, str(SCRIPT), json.dumps(chosen)],
        env={**os.environ, **SGLANG_ENVIRON, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    "policy",
    [
        "write_through",
        pytest.param("write_back", marks=LONG),
        pytest.param("write_through_selective", marks=LONG),
    ],
)
def test_what_is_found_was_written_though_memory_goes_while_copies_are_open(policy: str) -> None:
    done = run(policy=policy)
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["fault"] == ""
    assert min(report["num_stores"], report["num_loads"]) > 0
    assert report["loaded_rows"] > 0
    assert (report["num_open_pages"], report["num_holders"]) == (1, 0)


@pytest.mark.slow
@pytest.mark.every_release
def test_a_load_into_what_is_mapped_later_ends_the_process() -> None:
    assert run(defect=UNMAPPED).returncode != 0
