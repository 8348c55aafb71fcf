"""Three real vLLM servers start at once on a pool with room for the weights of one."""

import asyncio
from pathlib import Path

import pytest
from helpers.warm_servers import launch_warm

from kvcached_core.units import MIB
from kvcached_demo.harness.engines import VLLM
from kvcached_demo.harness.load import Burst
from kvcached_demo.harness.model import make_model
from kvcached_demo.harness.servers import Servers

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

NAMES = ("one", "two", "three")
PAGE = 2 * MIB
NUM_WEIGHTS = 6  # pages of each model
POOL = 12 * PAGE  # beside the weights of one: its request, and the others' first pages
NUM_MORE_ROUNDS = 2  # before a release: what goes wrong seldom
BURST = Burst(((5, 6, 7, 8),), 8)


@pytest.mark.parametrize(
    "number",
    [
        0,
        *(
            pytest.param(number, marks=pytest.mark.every_release)
            for number in range(1, 1 + NUM_MORE_ROUNDS)
        ),
    ],
)
def test_all_become_ready_and_answer(number: int, tmp_path: Path) -> None:
    with Servers(tmp_path, POOL, launch_warm) as servers:
        for seed, name in enumerate(NAMES, number):
            servers.start(
                VLLM,
                name,
                make_model(tmp_path / f"model-{name}", seed=seed),
                *VLLM.caching(is_on=False),
                *VLLM.longest(128),
                is_elastic=True,
                environ={
                    **VLLM.host_environ,
                    "KVCACHED_PAGE_BYTES": str(PAGE),
                    "KVCACHED_WEIGHTS": "yield",
                    "KVCACHED_WEIGHTS_KEPT_SECONDS": "0",
                },
            )
        servers.wait_ready()
        rows = servers.device().instances
        assert sum(row.weights_needed_bytes for row in rows) == len(NAMES) * NUM_WEIGHTS * PAGE
        assert sum(row.resident_bytes for row in rows) <= POOL
        found = asyncio.run(servers.send(dict.fromkeys(NAMES, BURST)))
        assert {answer.error for name in NAMES for answer in found[name]} == {None}
