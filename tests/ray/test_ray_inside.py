"""The port between nodes: who has its token is answered, and nobody else, whatever is sent."""

import asyncio
from contextlib import AsyncExitStack
from urllib.parse import urlsplit

import pytest
from aiohttp import web
from helpers.loops import on_a_loop

from kvcached_ray.inside import TOKEN, listen_inside, with_token

SECRET = "the one of this node"


async def here(request: web.Request) -> web.Response:
    del request
    return web.Response(text="here")


async def status_of(token: bytes | None) -> int:
    """Return what the port answers to a header with these bytes."""
    async with AsyncExitStack() as stack:
        app = web.Application(middlewares=[with_token(SECRET)])
        app.router.add_get("/", here)
        url = urlsplit(await listen_inside(stack, web.AppRunner(app), "127.0.0.1"))
        reader, writer = await asyncio.open_connection(url.hostname, url.port)
        stack.callback(writer.close)
        said = b"" if token is None else TOKEN.encode() + b": " + token + b"\r\n"
        writer.write(b"GET / HTTP/1.1\r\nHost: node\r\n" + said + b"\r\n")
        return int((await reader.readline()).split()[1])


@on_a_loop
async def test_the_token_opens_the_port() -> None:
    assert await status_of(SECRET.encode()) == 200


@pytest.mark.parametrize(
    "token",
    [
        None,
        b"",
        SECRET.encode()[:-1],
        SECRET.encode() + b"x",
        b"\xff",  # no UTF-8
        SECRET.encode() + b"\xed\xb3\xbf",  # a surrogate
        "ключ".encode(),
    ],
)
@on_a_loop
async def test_no_other_header_opens_it_or_breaks_it(token: bytes | None) -> None:
    assert await status_of(token) == 403
