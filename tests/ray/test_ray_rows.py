"""Two nodes of Ray with real engines serve as one machine does.

Each node has a PID namespace and a folder of ledgers of its own.
"""

import json
import random

import aiohttp
import pytest
from helpers.containers import why_not
from helpers.gateway_engines import GREEDY, ask, public_bodies
from helpers.gateway_served import ask_in_turn
from helpers.loops import on_a_loop
from helpers.ray_nodes import HEAD, OTHER, RayCluster

from kvcached_gateway.http.app import ENGINE_PATHS

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_not()), reason=f"no namespaces: {why_not()}"),
]

STREAMED = ("/v1/chat/completions", "/v1/completions", "/v1/messages")
TRIES = 30


def test_no_request_to_models_on_two_nodes_is_lost_and_each_engine_is_started_once(
    cluster: RayCluster,
) -> None:
    chosen, extent = random.Random(3), cluster.extent
    asked = [chosen.choice(extent.models) for _ in range(extent.num_requests)]
    answers = ask_in_turn(cluster.url, asked, num_at_once=16)
    assert answers.seen == {200: extent.num_requests}, answers.errors[:3]
    found = cluster.up()
    assert {len(nodes) for nodes in found.values()} == {1}, found
    assert set.union(*found.values()) == {HEAD, OTHER}, found
    starts = [row.num_starts for node in cluster.nodes.values() for row in node.rows().values()]
    assert sum(starts) == len(extent.bases)


@on_a_loop
async def test_every_public_path_answers_what_the_engine_itself_does(cluster: RayCluster) -> None:
    bodies, good = public_bodies("a"), set()
    connector = aiohttp.UnixConnector(cluster.engine_socket("a"))
    async with (
        aiohttp.ClientSession(cluster.url) as ours,
        aiohttp.ClientSession("http://localhost", connector=connector) as direct,
    ):
        for path in ENGINE_PATHS:
            body = bodies.get(path, GREEDY | {"model": "a"})
            for more in ({}, {"stream": True}) if path in STREAMED else ({},):
                for _ in range(TRIES):  # how many tokens an event has is a matter of timing
                    answers = [await ask(each, path, body | more) for each in (ours, direct)]
                    if answers[0] == answers[1]:
                        break
                assert answers[0] == answers[1], path
                if answers[0].status == 200:
                    good.add((path, b"data: " in answers[0].body))
    assert good >= {(path, is_streamed) for path in STREAMED for is_streamed in (True, False)}
    assert {path for path, _ in good} >= {"/v1/responses", "/tokenize", "/detokenize"}


@on_a_loop
async def test_the_gateways_own_paths_speak_of_the_whole_cluster(cluster: RayCluster) -> None:
    models = cluster.extent.models
    async with aiohttp.ClientSession(cluster.url) as session:

        async def get(path: str) -> tuple[int, str]:
            async with session.get(path) as answer:
                return answer.status, await answer.text()

        status, listed = await get("/v1/models")
        assert (status, {one["id"] for one in json.loads(listed)["data"]}) == (200, set(models))
        status, one = await get("/v1/models/of-a")
        assert (status, json.loads(one)["id"]) == (200, "of-a")
        assert [(await get(path))[0] for path in ("/health", "/ready")] == [200, 200]
        status, metrics = await get("/metrics")
        assert status == 200
        assert all(f'model="{name}"' in metrics for name in models)
        status, missing = await get("/sleep")
        assert (status, json.loads(missing)["error"]["code"]) == (404, "path_not_found")
        body = GREEDY | {"model": "nobody", "prompt": "memory"}
        unknown = await ask(session, "/v1/completions", body)
        assert unknown.status == 404
        assert b'"model_not_found"' in unknown.body
