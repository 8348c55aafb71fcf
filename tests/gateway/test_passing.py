"""The data path in front of real engines: bytes unchanged, cancels, and engines that die."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import openai
import pytest
from helpers.gateway_engines import GREEDY as GREEDY_OF_ANY
from helpers.gateway_engines import RealEngine, ask, public_bodies, start_sglang, start_vllm
from helpers.gateway_front import GivenLeases, House, front_served, make_settings, read_torn
from helpers.loops import on_a_loop
from helpers.waiting import PATIENCE_SECONDS

from kvcached_demo.harness.model import make_model
from kvcached_gateway.http.app import ENGINE_PATHS
from kvcached_gateway.http.workers import Workers
from kvcached_gateway.lease import Ending

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

GREEDY = GREEDY_OF_ANY | {"model": "tiny"}
BODIES = public_bodies("tiny")
CHAT = BODIES["/v1/chat/completions"]
STREAMED = ("/v1/chat/completions", "/v1/completions", "/v1/messages")
# How many tokens an engine puts into an event of a stream is a matter of its timing.
TRIES = 30
LONG = GREEDY | {"prompt": "memory", "max_tokens": 1500, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny", seed=1)


def run_until_ready(engine: RealEngine) -> Iterator[RealEngine]:
    try:
        asyncio.run(engine.wait_ready())
        yield engine
    finally:
        if engine.process.poll() is None:
            engine.kill()


@pytest.fixture(scope="module")
def vllm(model: Path) -> Iterator[RealEngine]:
    yield from run_until_ready(start_vllm(model))


@pytest.fixture(scope="module")
def sglang(model: Path) -> Iterator[RealEngine]:
    yield from run_until_ready(start_sglang(model))


@pytest.fixture
def mortal(model: Path) -> Iterator[RealEngine]:
    """An engine that may be killed."""
    yield from run_until_ready(start_vllm(model))


@asynccontextmanager
async def in_front(*engines: RealEngine) -> AsyncIterator[tuple[House, aiohttp.ClientSession]]:
    """Serve a front whose leases go to these engines, and a client of it."""
    leases = GivenLeases(*(engine.address for engine in engines))
    async with front_served(leases) as house, aiohttp.ClientSession(house.url) as client:
        yield house, client


async def check_equal(engine: RealEngine, *, is_streamed: bool) -> set[str]:
    """Compare answers with the engine's own; return the paths that it answers with 200."""
    good = set()
    async with in_front(engine) as (house, client), engine.session() as direct:
        for path in STREAMED if is_streamed else ENGINE_PATHS:
            body = BODIES.get(path, GREEDY) | ({"stream": True} if is_streamed else {})
            for _ in range(TRIES):
                ours, theirs = await ask(client, path, body), await ask(direct, path, body)
                if ours == theirs:
                    break
            assert ours == theirs, path
            if ours.status == 200:
                good.add(path)
                assert (b"data: " in ours.body) is is_streamed
        assert all(lease.endings[0][0] is Ending.DONE for lease in house.leases.leases)
        assert all(lease.num_first_bytes == 1 for lease in house.leases.leases)
    return good


@on_a_loop
async def test_answers_of_vllm_are_its_own_byte_for_byte(vllm: RealEngine) -> None:
    assert await check_equal(vllm, is_streamed=False) >= {
        *("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"),
        *("/v1/messages/count_tokens", "/tokenize", "/detokenize"),
    }
    assert await check_equal(vllm, is_streamed=True) == set(STREAMED)


@pytest.mark.sglang
@on_a_loop
async def test_answers_of_sglang_are_its_own_byte_for_byte(sglang: RealEngine) -> None:
    assert await check_equal(sglang, is_streamed=False) >= {
        *("/v1/chat/completions", "/v1/completions", "/v1/messages", "/tokenize", "/detokenize"),
    }
    assert await check_equal(sglang, is_streamed=True) == set(STREAMED)


@on_a_loop
async def test_errors_of_an_engine_and_long_bodies_pass_too(vllm: RealEngine) -> None:
    bodies = (
        GREEDY | {"prompt": "word " * 400_000},  # longer than what is written in one piece
        GREEDY | {"prompt": "memory", "max_tokens": -1},
        GREEDY | {"prompt": {"odd": 1}},
    )
    async with in_front(vllm) as (house, client), vllm.session() as direct:
        for body in bodies:
            ours, theirs = [await ask(one, "/v1/completions", body) for one in (client, direct)]
            assert ours == theirs
            assert ours.status == 400
        assert [lease.endings for lease in house.leases.leases] == [[(Ending.DONE, 400)]] * 3
        assert house.written.told == [("answered", "tiny", None, 400)] * 3


@on_a_loop
async def test_headers_say_what_the_request_waited_for_and_nothing_of_the_engines_key(
    sglang: RealEngine,
) -> None:
    async with in_front(sglang) as (house, client):
        body = GREEDY | {"prompt": "memory"}
        headers = {"Authorization": "Bearer of-the-client"}
        async with client.post("/v1/completions", json=body, headers=headers) as answer:
            assert answer.status == 200  # the engine has its own key
            await answer.read()
            assert answer.headers["X-Kvcached-Queue-Ms"] == "0"
            assert answer.headers["X-Kvcached-Cold-Start"] == "none"
            assert "of-the-engine" not in str(answer.headers)
        assert "of-the-client" not in sglang.log.read_text()
        (told,) = house.written.answers
        assert 0 < (told.ttft_seconds or 0) <= told.seconds


@on_a_loop
async def test_openais_client_streams_through_it(vllm: RealEngine) -> None:
    async with in_front(vllm) as (house, _):
        client = openai.AsyncOpenAI(base_url=f"{house.url}/v1", api_key="none", max_retries=0)
        async with client:
            assert [model.id async for model in client.models.list()] == ["tiny", "slow"]
            stream = await client.chat.completions.create(**CHAT, stream=True)
            streamed = "".join([part.choices[0].delta.content or "" async for part in stream])
            whole = await client.chat.completions.create(**CHAT)
            assert streamed == whole.choices[0].message.content
            with pytest.raises(openai.NotFoundError, match="is not a path of this gateway"):
                await client.post("/sleep", cast_to=object)


@on_a_loop
async def test_a_client_that_leaves_stops_the_engine(vllm: RealEngine) -> None:
    before = await vllm.counter(vllm.generated)
    async with in_front(vllm) as (house, client):
        async with client.post("/v1/completions", json=LONG) as answer:
            await answer.content.readuntil(b"\n\n")
            answer.close()
        (lease,) = house.leases.leases
        await lease.ended.wait()
        await vllm.await_idle()
        assert lease.endings == [(Ending.CANCELLED, 0)]
        assert await vllm.counter(vllm.generated) - before < LONG["max_tokens"]
        await house.written.cancelled_one.wait()
        assert house.written.told == [("cancelled", "stream")]


@on_a_loop
async def test_a_client_that_leaves_before_the_first_byte_stops_the_engine(
    vllm: RealEngine,
) -> None:
    before = await vllm.counter(vllm.generated)
    async with in_front(vllm) as (house, client):
        whole = LONG | {"stream": False}
        asking = asyncio.create_task(ask(client, "/v1/completions", whole))
        while not await vllm.counter(vllm.running):  # noqa: ASYNC110  a counter calls nobody
            await asyncio.sleep(0.02)
        asking.cancel()
        (lease,) = house.leases.leases
        await lease.ended.wait()
        await vllm.await_idle()
        assert lease.endings == [(Ending.CANCELLED, 0)]
        assert lease.num_first_bytes == 0
        assert await vllm.counter(vllm.generated) - before < LONG["max_tokens"]


@on_a_loop
async def test_an_engine_that_dies_in_its_answer_ends_the_stream_with_an_error_and_no_clean_end(
    mortal: RealEngine,
) -> None:
    async with in_front(mortal) as (house, client):
        async with client.post("/v1/completions", json=LONG) as answer:
            seen = await answer.content.readuntil(b"\n\n")
            mortal.kill()
            seen += await read_torn(answer.content)
        events = seen.removesuffix(b"\n\n").split(b"\n\n")
        error = json.loads(events[-1].removeprefix(b"data: "))["error"]
        assert (error["code"], error["type"]) == ("engine_died", "server_error")
        assert b"[DONE]" not in seen
        assert all(json.loads(event.removeprefix(b"data: ")) for event in events[:-1] if event)
        assert house.leases.leases[0].endings == [(Ending.DIED_WITHIN, 200)]
        assert house.written.told == [("answered", "tiny", None, 502)]
        assert len(house.leases.asks) == 1  # nothing is asked again after the first byte


@on_a_loop
async def test_an_engine_that_dies_before_its_answer_is_asked_again_once(
    mortal: RealEngine, sglang: RealEngine
) -> None:
    body = GREEDY | {"prompt": "memory"}
    async with in_front(mortal, sglang) as (house, client):
        os.killpg(mortal.process.pid, signal.SIGSTOP)
        asking = asyncio.create_task(ask(client, "/v1/completions", body))
        while not house.leases.leases:  # noqa: ASYNC110  it is on its way
            await asyncio.sleep(0.02)
        mortal.kill()
        assert (await asking).status == 200
        assert [lease.endings[0][0] for lease in house.leases.leases] == [
            Ending.DIED_BEFORE,
            Ending.DONE,
        ]
        assert [given.is_again for given in house.leases.asks] == [False, True]
    async with in_front(mortal) as (house, client):
        said = await ask(client, "/v1/completions", body)
        assert said.status == 502
        assert json.loads(said.body)["error"]["code"] == "engine_died"
        assert [given.is_again for given in house.leases.asks] == [False, True]
        assert house.written.told == [("refused", "tiny", "engine_died")]


@on_a_loop
async def test_a_worker_passes_an_engines_bytes_and_its_death_stops_the_engine(
    vllm: RealEngine,
) -> None:
    leases = GivenLeases(vllm.address)
    house = House(leases, make_settings(), None)
    workers = Workers(house.front(), "127.0.0.1", 0, 1)
    house.port = workers.port
    workers.start()
    try:
        body = GREEDY | {"prompt": "memory"}
        async with aiohttp.ClientSession(house.url) as client, vllm.session() as direct:
            async with asyncio.timeout(PATIENCE_SECONDS):
                while True:
                    try:
                        ours = await ask(client, "/v1/completions", body)
                        break
                    except aiohttp.ClientConnectionError:
                        await asyncio.sleep(0.05)  # nobody tells when a port is listened on
            assert ours == await ask(direct, "/v1/completions", body)
            async with client.post("/v1/completions", json=LONG) as answer:
                await answer.content.readuntil(b"\n\n")
                os.kill(workers.pids[0], signal.SIGKILL)
                await read_torn(answer.content)
        await leases.leases[-1].ended.wait()
        assert leases.leases[-1].endings == [(Ending.CANCELLED, 0)]
        await vllm.await_idle()
    finally:
        await workers.stop()
