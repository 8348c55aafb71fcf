"""The connections that the proxy keeps: one pool for each address."""

import asyncio

import pytest

from kvcached_gateway.http import proxy
from kvcached_gateway.http.proxy import Proxy
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
