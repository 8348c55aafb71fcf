"""How many clients are let in, by the files that the process may have; the others are told."""

import asyncio
import json
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest
from aiohttp import web
from helpers.gateway_front import (
    GivenLeases,
    House,
    RefusingLeases,
    engine_served,
    make_settings,
    say,
)
from helpers.loops import on_a_loop
from helpers.waiting import PATIENCE_SECONDS

from kvcached_gateway.http import door, silence
from kvcached_gateway.http.app import build_app, build_runner
from kvcached_gateway.http.door import Door, allow_files, max_connections
from kvcached_gateway.lease import Address, Ending

ASK = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
LAST = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
NUM_PLACES = 3
NUM_AT_ONCE = 300


@pytest.fixture
def few_files(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let there be files for so many connections."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr(door, "RESERVED_FILES", 500)
    resource.setrlimit(resource.RLIMIT_NOFILE, (500 + 2 * NUM_PLACES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@on_a_loop
async def test_a_burst_of_connections_is_let_in_while_the_loop_is_busy() -> None:
    house = House(RefusingLeases(), make_settings(), None)
    runner = build_runner(build_app(house.front()))
    await runner.setup()
    await Door(runner, house.front(), "127.0.0.1", 0).start()
    place = runner.addresses[0]
    with ExitStack() as clients:
        # The loop accepts none of them meanwhile. One that is dropped tries again after a second.
        for _ in range(NUM_AT_ONCE):
            clients.enter_context(socket.create_connection(place, timeout=0.5))
    await runner.cleanup()


@pytest.mark.usefixtures("few_files")
@on_a_loop
async def test_whoever_comes_when_all_files_are_in_use_is_told_and_may_come_again() -> None:
    house = House(RefusingLeases(), make_settings(), None)
    runner = build_runner(build_app(house.front()))
    await runner.setup()
    await Door(runner, house.front(), "127.0.0.1", 0).start()
    house.port = runner.addresses[0][1]
    try:
        inside = [await asyncio.open_connection("127.0.0.1", house.port) for _ in range(NUM_PLACES)]
        for reader, writer in inside:
            writer.write(ASK)
            assert b"200" in await reader.readline()
        for _ in range(2 * NUM_PLACES):  # a refusal takes nobody's place
            head, _, body = (await say(house, LAST)).partition(b"\r\n\r\n")
            assert b" 503 " in head
            assert b"Retry-After: 1" in head
            assert json.loads(body)["error"]["code"] == "too_many_connections"
        assert house.written.told == [("refused", None, "too_many_connections")] * 2 * NUM_PLACES
        inside[0][1].close()
        async with asyncio.timeout(PATIENCE_SECONDS):
            while b" 200 " not in await say(house, LAST):
                pass  # until the gateway has seen that one left
        inside[1][1].write(ASK)
        while not (await inside[1][0].readline()).startswith(b"HTTP/1.1 200"):
            pass  # who is inside goes on
        for _, writer in inside:
            writer.close()
    finally:
        await runner.cleanup()


def test_a_gateway_has_all_the_files_that_it_may_have() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (300, before[1]))
        assert max_connections() == (300 - door.RESERVED_FILES) // 2
        allow_files()
        allowed = min(before[1], door.ENOUGH_FILES)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (allowed, before[1])
        assert max_connections() == (allowed - door.RESERVED_FILES) // 2
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


async def talk_without_end(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    with suppress(ConnectionError):
        while True:
            await response.write(b"x" * 4096)
    return response


@on_a_loop
async def test_a_client_that_takes_nothing_of_its_answer_is_let_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(door, "SILENT_SECONDS", 1)
    monkeypatch.setattr(silence, "NUM_PROBES", 1)
    async with engine_served(talk_without_end) as url:
        leases = GivenLeases(Address(url))
        house = House(leases, make_settings(), None)
        runner = build_runner(build_app(house.front()))
        await runner.setup()
        await Door(runner, house.front(), "127.0.0.1", 0).start()
        body = json.dumps({"model": "tiny"}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
        with socket.create_connection(runner.addresses[0]) as client:
            client.sendall(head + body)
            async with asyncio.timeout(PATIENCE_SECONDS):
                await house.written.cancelled_one.wait()
        assert house.written.told == [("cancelled", "stream")]
        assert leases.leases[0].endings == [(Ending.CANCELLED, 0)]
        await runner.cleanup()
