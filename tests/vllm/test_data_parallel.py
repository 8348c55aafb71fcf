"""Two data-parallel ranks of one server: an instance each, vanilla's tokens, nothing left behind.

A model with experts computes each step on both ranks: one without requests steps on made-up ones.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.answered import ask
from helpers.engine_plugin import VLLM as VLLM_PLUGINS
from helpers.engine_plugin import add_plugin
from helpers.expert_models import make_expert_model
from helpers.offload_plugin import transfer
from helpers.process_memory import resident_of_ranks
from helpers.waiting import await_that
from helpers.warm_servers import launch_warm

from kvcached_core.control import trim
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.view import InstanceView
from kvcached_core.units import MIB
from kvcached_demo.harness.engines import VLLM
from kvcached_demo.harness.load import make_burst
from kvcached_demo.harness.model import KV_BYTES_PER_TOKEN, make_model
from kvcached_demo.harness.server import EngineServer
from kvcached_demo.harness.servers import Servers

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.every_release]

POOL = 256 * MIB
PAGE = 8 * MIB
MAKERS = {"experts": make_expert_model, "dense": make_model}
NAMES = ("elastic", "elastic-dp1")
PLUGINS = {"experts": "helpers.expert_plugin", "copier": "helpers.offload_plugin"}
HITS = 'vllm:external_prefix_cache_hits_total{{engine="{}"'
MANY = make_burst(num_requests=8, num_prompt_tokens=200, num_output_tokens=16, seed=1)
ONE = make_burst(num_requests=1, num_prompt_tokens=600, num_output_tokens=48, seed=2)
BURSTS = (MANY, ONE, MANY)


class Replicas(Servers):
    """Servers of two data-parallel ranks each, with one process for requests."""

    def begin(
        self, name: str, model: Path, *, is_elastic: bool = True, copier: Any = None
    ) -> EngineServer:
        tier = () if copier is None else ("--kv-transfer-config", json.dumps(transfer(**copier)))
        plugins = [
            add_plugin(self.workspace / folder, module, VLLM_PLUGINS)["PYTHONPATH"]
            for folder, module in PLUGINS.items()
        ]
        server = self.start(
            VLLM,
            name,
            model,
            *("--data-parallel-size", "2", "--api-server-count", "1"),
            *tier,
            *VLLM.caching(is_on=bool(tier)),
            *VLLM.running(16),
            *VLLM.longest(1024),
            *VLLM.size(POOL // 2, KV_BYTES_PER_TOKEN, is_elastic=is_elastic, is_host=True),
            is_elastic=is_elastic,
            environ={
                "KVCACHED_DEBUG": "1",
                "KVCACHED_PAGE_BYTES": str(PAGE),
                "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
                "VLLM_CPU_OMP_THREADS_BIND": "0|1",
                "PYTHONPATH": os.pathsep.join(plugins),
            },
        )
        server.wait_ready()
        return server

    def views(self) -> dict[str, InstanceView]:
        with Ledger(self.directory / "host.ledger") as ledger:
            return {view.name: view for view in ledger.view().instances}


def hits(server: EngineServer) -> list[float]:
    return [server.metric(HITS.format(rank)) for rank in range(len(NAMES))]


@pytest.fixture(scope="module", params=["experts", "dense"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MAKERS[request.param](tmp_path_factory.mktemp("models") / request.param, seed=3)


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[list[int]]]:
    """What two ranks of vLLM alone answer."""
    with Replicas(tmp_path_factory.mktemp("vanilla"), POOL, launch_warm) as servers:
        server = servers.begin("vanilla", model, is_elastic=False)
        return [ask(server, burst) for burst in BURSTS]


@pytest.fixture(scope="module")
def elastic(
    model: Path, expected: object, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Replicas]:
    del expected  # one server at a time
    with Replicas(tmp_path_factory.mktemp("elastic"), POOL, launch_warm) as servers:
        servers.begin("elastic", model)
        yield servers


def test_ranks_answer_as_vanilla_and_keep_nothing(
    elastic: Replicas, expected: list[list[list[int]]]
) -> None:
    server = elastic["elastic"]
    assert [ask(server, burst) for burst in BURSTS] == expected
    await_that(lambda: max(resident_of_ranks(server)) <= 2 * PAGE)
    used = {name: view.used_bytes for name, view in elastic.views().items()}
    assert used == dict.fromkeys(NAMES, PAGE)  # the null block's
    assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize("spoils_loads", [False, True], ids=["right", "spoiled"])
def test_each_rank_answers_from_what_comes_back_of_a_host_tier_of_its_own(
    model: Path, expected: list[list[list[int]]], tmp_path: Path, *, spoils_loads: bool
) -> None:
    copier = {"num_bytes": 64 * MIB, "delay_ms": (0, 20), "spoils_loads": spoils_loads}
    with Replicas(tmp_path, POOL, launch_warm) as servers:
        server = servers.begin("elastic", model, copier=copier)
        first = [ask(server, burst) for burst in BURSTS]
        before, later = hits(server), []

        def has_each_rank_loaded() -> bool:
            trim(NAMES, directory=servers.directory)
            await_that(lambda: max(resident_of_ranks(server)) <= 2 * PAGE)
            later.append([ask(server, burst) for burst in BURSTS])
            return all(now > then for now, then in zip(hits(server), before, strict=True))

        await_that(has_each_rank_loaded)  # which rank has a request is up to vLLM, each time
        assert "Traceback" not in server.log.read_text()
    assert first == expected
    assert all(answers == expected for answers in later) is not spoils_loads
