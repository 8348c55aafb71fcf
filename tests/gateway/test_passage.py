"""What becomes of a request whose engine is about to end when its answer comes."""

import asyncio
import json
from typing import Any

import aiohttp
import pytest
from helpers.gateway_front import (
    GivenLease,
    GivenLeases,
    PatientLeases,
    RefusingLeases,
    front_served,
    read_torn,
)
from helpers.loops import on_a_loop

from kvcached_gateway.lease import Address, Ask, Ending, Lease

PATH = "/v1/completions"


class Closing(GivenLeases):
    """Hands out leases of which the first ones are closed before an answer begins."""

    def __init__(self, address: Address, num_closed: int) -> None:
        super().__init__(address)
        self._num_closed = num_closed

    async def take(self, ask: Ask) -> Lease:
        lease = await super().take(ask)
        self.leases[-1].is_closed = len(self.leases) <= self._num_closed
        return lease


@on_a_loop
async def test_an_answer_that_may_not_begin_is_asked_for_again_before_a_byte_of_it() -> None:
    """What answers is a front that refuses: any server would do."""
    for num_closed, code in ((1, "model_loading"), (2, "engine_died")):
        async with front_served(RefusingLeases()) as engine:
            leases = Closing(Address(engine.url), num_closed)
            async with (
                front_served(leases) as house,
                aiohttp.ClientSession() as session,
                session.post(house.url + "/v1/completions", json={"model": "tiny"}) as answer,
            ):
                assert (await answer.json())["error"]["code"] == code
        assert [ask.is_again for ask in leases.asks] == [False, True]
        endings = [ending for lease in leases.leases for ending, _ in lease.endings]
        assert endings == [Ending.DIED_BEFORE] * num_closed + [Ending.DONE] * (2 - num_closed)


async def answered_by_deadline(leases: GivenLeases, deadline_ms: int) -> tuple[int, Any]:
    """Return the status and the answer of a request whose client waits no longer than this."""
    headers = {"X-Kvcached-Deadline-Ms": str(deadline_ms)}
    async with (
        front_served(leases) as house,
        aiohttp.ClientSession() as session,
        session.post(house.url + PATH, json={"model": "tiny"}, headers=headers) as answer,
    ):
        return answer.status, await answer.json()


@on_a_loop
async def test_a_request_that_is_asked_for_again_has_what_is_left_of_its_deadline() -> None:
    async with front_served(RefusingLeases()) as engine:
        leases = Closing(Address(engine.url), 1)
        await answered_by_deadline(leases, 600_000)
    first, second = (ask.deadline_seconds for ask in leases.asks)
    assert first is not None
    assert second is not None
    assert 0 < second < first < 600


class Late(Closing):
    """Hands out leases only when every deadline of a test is past."""

    async def take(self, ask: Ask) -> Lease:
        await asyncio.sleep(0.05)
        return await super().take(ask)


@on_a_loop
async def test_nothing_is_asked_for_again_behind_the_deadline() -> None:
    async with front_served(RefusingLeases()) as engine:
        leases = Late(Address(engine.url), 2)
        status, said = await answered_by_deadline(leases, 20)
    assert (status, said["error"]["code"]) == (504, "deadline")
    assert len(leases.asks) < 2


@on_a_loop
async def test_an_engine_that_dies_in_a_plain_answer_to_a_stream_with_comments_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kvcached_gateway.http.passage.COMMENT_SECONDS", 0.05)

    async def die(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 500 Oh\r\ncontent-length: 100\r\n\r\nhalf of it")
        await writer.drain()
        writer.close()

    engine = await asyncio.start_server(die, "127.0.0.1", 0)
    lease = GivenLease(Address(f"http://127.0.0.1:{engine.sockets[0].getsockname()[1]}"))
    body = json.dumps({"model": "slow", "stream": True}).encode()
    async with (
        engine,
        front_served(leases := PatientLeases()) as house,
        aiohttp.ClientSession() as session,
        session.post(house.url + "/v1/completions", data=body) as answer,
    ):
        assert await answer.content.readuntil(b"\n\n") == b": the model is starting\n\n"
        leases.answer.set_result(lease)
        event = (await read_torn(answer.content)).rpartition(b"data: ")[2]
    assert json.loads(event)["error"]["code"] == "engine_died"
    assert lease.endings == [(Ending.DIED_WITHIN, 500)]
    assert house.written.told == [("answered", "tiny", None, 502)]
