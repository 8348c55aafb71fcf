"""Two nodes of Ray with real engines, steered as one gateway; a gateway that dies alone."""

import asyncio
import json
import os
import signal
from pathlib import Path

import aiohttp
import pytest
from helpers.containers import why_not
from helpers.gateway_engines import GREEDY
from helpers.gateway_served import UP_SECONDS, client
from helpers.loops import on_a_loop
from helpers.ray_models import COLD, NUM_TOKENS
from helpers.ray_nodes import RayCluster
from helpers.waiting import await_that

from kvcached_gateway.admin.client import Client, GatewayError

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_not()), reason=f"no namespaces: {why_not()}"),
]

ASKED = GREEDY | {"prompt": "memory follows", "ignore_eos": True}


@pytest.fixture
def steered(cluster: RayCluster) -> Client:
    return Client(cluster.directory, UP_SECONDS)


def state(gateway: Client, name: str) -> str:
    """Return a model's state; nothing where the gateway does not answer."""
    try:
        return {row.id: row.state for row in gateway.models()}[name]
    except GatewayError:
        return ""


def completion(cluster: RayCluster, name: str) -> str:
    """Return what a model answers, which it has to."""

    async def asked() -> str:
        body = ASKED | {"model": name}
        async with (
            client() as session,
            session.post(f"{cluster.url}/v1/completions", json=body) as answer,
        ):
            assert answer.status == 200, await answer.text()
            return str((await answer.json())["choices"][0]["text"])

    return asyncio.run(asked())


def test_a_model_is_warmed_and_explained_by_its_name_alone(
    cluster: RayCluster, steered: Client
) -> None:
    text, warm, is_settled = steered.steer("a", "warm", UP_SECONDS)
    assert "a is up, or on its way" in text
    assert (warm.state, is_settled) == ("warm", True)
    (device,) = warm.devices
    node, _, name = device.partition("/")
    assert (node in cluster.nodes, name) == (True, "host")
    explained = steered.explain("a")
    assert explained.startswith(f"start: on {node}: ")
    assert f"\non {node}:\n  a is warm" in explained
    assert cluster.nodes[node].rows()["a"].state == "warm"
    with pytest.raises(GatewayError, match="there is no model 'nobody'"):
        steered.explain("nobody")


def test_a_file_with_a_mistake_changes_nothing_and_a_good_one_reaches_every_node(
    cluster: RayCluster, steered: Client
) -> None:
    old = cluster.file.read_text()
    values = json.loads(old)
    try:
        cluster.file.write_text(json.dumps({**values, "no such key": 1}))
        with pytest.raises(GatewayError, match="no such key"):
            steered.reload()
        values["models"]["b"]["aliases"] = ["bee"]
        cluster.file.write_text(json.dumps(values))
        told = steered.reload()
        assert all(f"{name}: " in told for name in cluster.nodes), told
    finally:
        cluster.file.write_text(old)
        steered.reload()


@on_a_loop
async def test_a_client_that_leaves_stops_the_engine(cluster: RayCluster) -> None:
    connector = aiohttp.UnixConnector(cluster.engine_socket("a"))
    async with aiohttp.ClientSession("http://localhost", connector=connector) as engine:

        async def counted(name: str) -> float:
            async with engine.get("/metrics") as answer:
                lines = (await answer.text()).splitlines()
            return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

        before = await counted("vllm:generation_tokens_total{")
        body = ASKED | {"model": "a", "max_tokens": NUM_TOKENS - 100, "stream": True}
        async with (
            aiohttp.ClientSession(cluster.url) as session,
            session.post("/v1/completions", json=body) as answer,
        ):
            await answer.content.readuntil(b"\n\n")
        async with asyncio.timeout(UP_SECONDS):
            while await counted("vllm:num_requests_running{"):  # noqa: ASYNC110  it calls nobody
                await asyncio.sleep(0.05)
        generated = await counted("vllm:generation_tokens_total{") - before
        assert 0 < generated < body["max_tokens"]


def test_a_gateway_that_dies_alone_is_started_again_and_adopts_its_engines(
    cluster: RayCluster,
) -> None:
    before = completion(cluster, COLD)
    (name,) = cluster.up()[COLD]
    there = Client(cluster.nodes[name].directory, UP_SECONDS)
    num_starts = cluster.nodes[name].rows()[COLD].num_starts
    os.kill(gateway_of(cluster.nodes[name].directory), signal.SIGKILL)
    assert completion(cluster, COLD) == before
    await_that(lambda: state(there, COLD) == "warm", UP_SECONDS)
    assert cluster.nodes[name].rows()[COLD].num_starts == num_starts  # an adoption is none
    for other in cluster.up()[COLD] - {name}:  # it answered meanwhile
        Client(cluster.nodes[other].directory, UP_SECONDS).steer(COLD, "stop", UP_SECONDS)
    assert completion(cluster, COLD) == before


def gateway_of(directory: Path) -> int:
    """Return the process of a node's gateway, in the namespace of this one."""
    held = (directory / "gateway" / "gateway.lock").stat().st_ino
    for process in Path("/proc").glob("[0-9]*"):
        try:
            opened = [link.stat().st_ino for link in (process / "fd").iterdir() if link.exists()]
            words = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if held in opened and b"ServeReplica" in words:
            return int(process.name)
    raise AssertionError(f"no gateway serves from {directory}")
