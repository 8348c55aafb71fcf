"""The connections that the proxy keeps: one pool for each address."""

import asyncio
from pathlib import Path

import pytest

from kvcached_gateway.engines.sglang import SglangWords
from kvcached_gateway.engines.vllm import VllmWords
from kvcached_gateway.engines.words import CONNECTION_SECONDS
from kvcached_gateway.http import proxy
from kvcached_gateway.http.proxy import OUR_KEEPALIVE_SECONDS, Proxy
from kvcached_gateway.lease import Address


def test_two_first_requests_to_an_engine_share_a_pool_while_an_old_one_is_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(proxy, "UNUSED_SECONDS", 0.0)

    async def run() -> None:
        kept = Proxy()
        await kept._pool(Address("http://old"))
        await asyncio.sleep(0.01)
        new = Address("http://new")
        one, other = await asyncio.gather(kept._pool(new), kept._pool(new))
        assert one is other
        assert list(kept._pools) == [("http://new", None)]
        await kept.close()

    asyncio.run(run())


def test_an_idle_connection_is_kept_as_long_as_the_one_at_its_other_end_keeps_it(
    tmp_path: Path,
) -> None:
    async def run() -> None:
        kept = Proxy()
        for address, seconds in (
            (VllmWords().address(tmp_path, "a"), OUR_KEEPALIVE_SECONDS),
            (SglangWords().address(tmp_path, "b"), OUR_KEEPALIVE_SECONDS),
            (Address("http://other:8000"), 3.0),  # uvicorn closes what was idle for 5 s
        ):
            connector = (await kept._pool(address)).session.connector
            assert connector is not None
            assert connector._keepalive_timeout == seconds < CONNECTION_SECONDS
        await kept.close()

    asyncio.run(run())
