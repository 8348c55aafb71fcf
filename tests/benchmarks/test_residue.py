"""What is left of a server that has yielded, and what each part of it is."""

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers.residue import annexes, by_pool, largest, pinned, write
from helpers.waiting import await_that
from parts.residue import handles_signal, parts
from parts.yielding_servers import ON_SIGNAL, with_tests

from kvcached_core.memory.vmm.host import HostBackend
from kvcached_core.units import MIB
from kvcached_core.weights.annex import Annex, Ranges

pytestmark = pytest.mark.vllm


def segment(pool: tuple[int, int], *blocks: tuple[int, str]) -> dict[str, Any]:
    """Return a segment as torch describes it, its blocks one behind the other."""
    described, address = [], 1000 * (pool[1] + 1)
    for size, state in blocks:
        described.append({"address": address, "size": size, "state": state})
        address += size
    used = sum(size for size, state in blocks if state != "inactive")
    total = sum(size for size, _ in blocks)
    described_segment = {"segment_pool_id": pool, "allocated_size": used, "total_size": total}
    return described_segment | {"blocks": described}


SEGMENTS = [
    segment((0, 0), (30, "active_allocated"), (30, "active_allocated"), (10, "inactive")),
    segment((0, 1), (5, "active_allocated"), (15, "inactive")),
]


def test_memory_of_graphs_is_told_from_other_memory() -> None:
    assert by_pool(SEGMENTS) == {"in_use_bytes": 60, "graphs_bytes": 20, "cached_bytes": 10}


def test_the_largest_blocks_are_named_and_counted() -> None:
    names = {1000: "int8 [30]", 1030: "int8 [30]"}
    expected = [[60, 2, "own", "int8 [30]"], [5, 1, "graphs", "? of 5 bytes"]]
    assert largest(SEGMENTS, names) == expected


def test_a_block_says_where_it_was_allocated_if_that_was_noted() -> None:
    frames = [
        {"filename": "/site/torch/_tensor.py", "line": 3, "name": "clone"},
        {"filename": "/site/vllm/sampler.py", "line": 20, "name": "sample"},
        {"filename": "/site/vllm/runner.py", "line": 7, "name": "run"},
    ]
    one = segment((0, 0), (30, "active_allocated"))
    one["blocks"][0]["frames"] = frames
    expected = "? of 30 bytes < sampler.py:20 sample < runner.py:7 run"
    assert largest([one], {}) == [[30, 1, "own", expected]]


def test_unused_memory_that_stays_is_named_by_what_is_used_beside_it() -> None:
    empty = segment((0, 0), (50, "inactive"))
    assert pinned([*SEGMENTS, empty], {1030: "int8 [30]"}) == [[10, 70, "? of 30 bytes"]]


def test_the_parts_of_what_is_held_add_up_to_it() -> None:
    found = parts(1000, 400, 16, by_pool(SEGMENTS))
    assert found == {
        "pages": 16,
        "context": 400,
        "in_use": 60,
        "graphs": 20,
        "cached": 10,
        "annex_resident": 0,
        "rest": 494,
    }


def test_what_lies_on_an_annex_is_told_from_other_memory_and_named() -> None:
    class Keeping:
        def in_use(self, spans: Mapping[int, int]) -> Mapping[int, Ranges]:
            return {address: [(address, size)] for address, size in spans.items()}

    host = (ctypes.c_int8 * (4 * MIB))()
    annex = Annex(HostBackend(), lambda _num_bytes: ctypes.addressof(host))
    address = annex.take(3 * MIB, Keeping())
    annex.backend.tensor(address, MIB).fill_(1)
    annex.drop()
    spans, found = annexes()
    assert spans == {address: 4 * MIB}
    assert found == {
        "annex_bytes": 4 * MIB,
        "annex_resident_bytes": 0,
        "annex_kept_bytes": 2 * MIB,
        "annex_spans": [[4 * MIB, "Keeping"]],
    }
    annex.close()


def test_a_worker_that_has_no_device_says_that_nothing_is_held(tmp_path: Path) -> None:
    path = tmp_path / "memory.json"
    write(path)
    report = json.loads(path.read_text())
    assert report["in_use_bytes"] == report["graphs_bytes"] == report["cached_bytes"] == 0


@contextmanager
def process(**environ: str) -> Iterator[int]:
    """Yield the id of a process that waits."""
    pipe, command = subprocess.PIPE, [sys.executable, "-c", "print('there', flush=True); input()"]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, env=os.environ | environ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        yield child.pid
        child.communicate(b"\n")
    assert child.returncode == 0


def test_a_process_that_was_told_so_reports_when_a_signal_comes(tmp_path: Path) -> None:
    report = tmp_path / "memory.json"
    path = f"{ON_SIGNAL}:{with_tests()}"
    with process(MEMORY_REPORT=str(report), PYTHONPATH=path) as pid:
        assert handles_signal(pid)
        os.kill(pid, signal.SIGUSR2)
        await_that(report.exists)
        assert json.loads(report.read_text())["pid"] == pid


def test_a_process_that_a_signal_would_end_is_sent_none() -> None:
    with process() as pid:
        assert not handles_signal(pid)
