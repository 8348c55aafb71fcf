"""Several processes on one port, with this process as their controller."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from helpers.gateway_front import House, PatientLeases, RefusingLeases, make_settings, say
from helpers.loops import on_a_loop
from helpers.waiting import PATIENCE_SECONDS

from kvcached_gateway.http import workers
from kvcached_gateway.http.workers import Workers

BODY = b'{"model": "tiny"}'
REQUEST = (
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(BODY), BODY)
)


@asynccontextmanager
async def working(house: House, num: int) -> AsyncIterator[Workers]:
    workers = Workers(house.front(), "127.0.0.1", 0, num)
    house.port = workers.port
    workers.start()
    try:
        await listening(house)
        yield workers
    finally:
        await workers.stop()


async def listening(house: House) -> None:
    """Wait until a worker listens."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            try:
                assert (await say(house, b"GET /health HTTP/1.0\r\n\r\n")).startswith(b"HTTP/1.")
            except ConnectionError:
                await asyncio.sleep(0.02)  # nobody tells when a port is listened on
            else:
                return


@on_a_loop
async def test_two_processes_answer_on_one_port_with_one_line() -> None:
    house = House(leases := RefusingLeases(), make_settings(), None)
    async with working(house, 2) as found:
        while len(set(found.pids)) < 2:  # noqa: ASYNC110  processes start
            await asyncio.sleep(0.02)
        for _ in range(20):
            assert b"model_loading" in await say(house, REQUEST)
        assert len(leases.asks) == 20
        async with aiohttp.ClientSession() as session:
            async with session.get(f"{house.url}/v1/models") as answer:
                cards = (await answer.json())["data"]
            async with session.get(f"{house.url}/metrics") as answer:
                assert "kvcached_gateway_queued" in await answer.text()
        assert [card["id"] for card in cards] == ["tiny", "slow"]
        assert house.written.told == [("refused", "tiny", "model_loading")] * 20
        house.is_ready = False
        found.changed()
        async with asyncio.timeout(PATIENCE_SECONDS):
            while b"draining" not in await say(house, REQUEST):
                pass
        pids = found.pids
    for pid in pids:
        assert not os.path.exists(f"/proc/{pid}")  # noqa: PTH110, ASYNC240  a look at a process


@on_a_loop
async def test_a_worker_that_is_killed_leaves_the_line_and_another_takes_its_place() -> None:
    house = House(leases := PatientLeases(), make_settings(), None)
    async with working(house, 1) as found:
        asking = asyncio.create_task(say(house, REQUEST))
        await leases.came.wait()
        (killed,) = found.pids
        os.kill(killed, signal.SIGKILL)
        await leases.left.wait()
        await asyncio.gather(asking, return_exceptions=True)
        await listening(house)
        assert found.pids != [killed]
        assert found.num_leases == 0


@on_a_loop
async def test_a_worker_that_cannot_be_started_for_now_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start, refusals = asyncio.create_subprocess_exec, [BlockingIOError(11, "no more processes")]

    async def start_later(*words: Any, **settings: Any) -> asyncio.subprocess.Process:
        if refusals:
            raise refusals.pop()
        return await start(*words, **settings)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", start_later)
    monkeypatch.setattr(workers, "RESTART_SECONDS", 0.01)
    async with working(House(RefusingLeases(), make_settings(), None), 1):
        assert not refusals
