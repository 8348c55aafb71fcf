"""Real SGLang servers start at once on a pool with room for the weights of one."""

import asyncio
from pathlib import Path

import pytest
from helpers.sglang_weights import NUM_KV_PAGES, NUM_WEIGHTS, PAGE, begin_yielding

from kvcached_demo.harness.load import Burst
from kvcached_demo.harness.model import make_model
from kvcached_demo.harness.servers import Servers

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

NAMES = ("one", "other")
POOL = (NUM_WEIGHTS + NUM_KV_PAGES + 2) * PAGE  # one of them with its KV cache, the other's page 0
BURST = Burst(((5, 6, 7, 8),), 8)


def test_all_become_ready_and_answer(model: Path, tmp_path: Path) -> None:
    with Servers(tmp_path, POOL) as servers:
        other = make_model(tmp_path / "model", seed=2)
        for name, folder in zip(NAMES, (model, other), strict=True):
            begin_yielding(servers, name, folder)
        servers.wait_ready()
        rows = servers.device().instances
        needed_bytes = len(NAMES) * NUM_WEIGHTS * PAGE
        assert sum(row.weights_needed_bytes for row in rows) == needed_bytes > POOL
        assert sum(row.resident_bytes for row in rows) <= POOL
        found = asyncio.run(servers.send(dict.fromkeys(NAMES, BURST)))
        assert {answer.error for name in NAMES for answer in found[name]} == {None}
