"""One gateway's front before another's, as in a cluster: what a client sees is the inner one's."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
from aiohttp import web
from helpers.gateway_front import (
    GivenLeases,
    RefusingLeases,
    engine_served,
    front_served,
    read_torn,
)
from helpers.loops import on_a_loop

from kvcached_gateway.http.error_answers import error_event
from kvcached_gateway.http.proxy import SILENT_SECONDS, _watched
from kvcached_gateway.lease import Address, Ask, Ending, Lease, Woken

BODY = {"model": "tiny", "stream": True}


class Late(GivenLeases):
    """Hands out leases that had to wait for a start."""

    async def take(self, ask: Ask) -> Lease:
        lease = await super().take(ask)
        self.leases[-1].woken = Woken.START
        self.leases[-1].waited_seconds = 1.25
        return lease


@asynccontextmanager
async def dying(*parts: bytes, goes_on: asyncio.Event | None = None) -> AsyncIterator[Address]:
    """Serve what dies within each answer: behind these parts, each after the one before was read.

    Args:
        parts: What comes of the answer.
        goes_on: Set by the test when it has read a part.
    """

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for part in parts:
            await response.write(part)
            if goes_on is not None:
                await goes_on.wait()
                goes_on.clear()
        assert request.transport is not None
        request.transport.close()
        return response

    app = web.Application()
    app.router.add_post("/v1/completions", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield Address(f"http://127.0.0.1:{runner.addresses[0][1]}")
    finally:
        await runner.cleanup()


@asynccontextmanager
async def asked(leases: GivenLeases) -> AsyncIterator[aiohttp.ClientResponse]:
    """Ask a front that has these leases."""
    async with (
        front_served(leases) as outer,
        aiohttp.ClientSession() as session,
        session.post(outer.url + "/v1/completions", json=BODY) as found,
    ):
        yield found


@on_a_loop
async def test_how_a_request_fared_inside_is_told_outside_and_a_death_is_told_once() -> None:
    async with dying(b"data: 1\n\n") as address, front_served(Late(address)) as inner:
        leases = GivenLeases(Address(inner.url, is_gateway=True))
        async with asked(leases) as found:
            assert found.headers["X-Kvcached-Queue-Ms"] == "1250"
            assert found.headers["X-Kvcached-Cold-Start"] == "start"
            torn = await read_torn(found.content)
    assert torn.count(b"engine_died") == 1
    assert b"[DONE]" not in torn
    assert leases.leases[0].endings == [(Ending.DIED_WITHIN, 200)]


async def passed_on(*parts: bytes) -> bytes:
    """Return what a client gets where an inner gateway's answer comes in parts, and breaks off."""
    goes_on, got = asyncio.Event(), b""
    async with dying(*parts, goes_on=goes_on) as address:
        leases = GivenLeases(Address(address.url, is_gateway=True))
        async with asked(leases) as found:
            for part in parts:
                got += await found.content.readexactly(len(part))
                goes_on.set()
            return got + await read_torn(found.content)


@on_a_loop
async def test_a_death_is_told_once_however_the_inner_ones_word_of_it_is_cut() -> None:
    for told in (error_event("engine_died", "it died"), error_event("draining", "it ends")):
        for cut in (1, 6, told.index(b'"code"') + 12, len(told) - 2, len(told) - 1):
            parts = (b"data: 1\n\n", told[:cut], told[cut:])
            assert await passed_on(*parts) == b"".join(parts), cut


@on_a_loop
async def test_a_death_is_told_though_the_text_before_it_speaks_of_one() -> None:
    for text in (b'data: {"text": "engine_died"}\n\n', b'data: {"error": {}}\n\ndata: 1\n\n'):
        assert (await passed_on(text)).count(b"died within its answer") == 1


@on_a_loop
async def test_what_the_inner_one_refuses_is_the_clients_answer() -> None:
    async with front_served(RefusingLeases()) as inner:
        leases = GivenLeases(Address(inner.url, is_gateway=True))
        async with asked(leases) as found:
            assert (found.status, found.headers["Retry-After"]) == (503, "7")
            assert (await found.json())["error"]["code"] == "model_loading"
    assert leases.leases[0].endings == [(Ending.DONE, 503)]


@on_a_loop
async def test_an_engine_cannot_say_how_a_request_fared() -> None:
    async def claim(_request: web.Request) -> web.StreamResponse:
        return web.Response(headers={"X-Kvcached-Queue-Ms": "9"})

    async with engine_served(claim) as url, asked(GivenLeases(Address(url))) as found:
        assert found.headers["X-Kvcached-Queue-Ms"] == "0"


def test_a_connection_to_another_machine_ends_soon_after_that_fell_silent() -> None:
    info = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", ("127.0.0.1", 1))
    with _watched(info) as made:
        assert made.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        idle = made.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
        probes = made.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT)
        apart = made.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL)
        unheard_ms = made.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
    assert idle == SILENT_SECONDS
    assert idle + probes * apart <= 15
    assert 0 < unheard_ms <= 15_000
