"""The front behind ASGI: what goes in and out of it, and what a broken answer looks like."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from aiohttp.typedefs import Handler
from helpers.loops import on_a_loop

from kvcached_ray.asgi import READ_BYTES, Asgi, BrokenAnswerError, Message
from kvcached_ray.nearness import only_here


class Client:
    """What Serve is to an ASGI application: it says these messages, and keeps what it hears."""

    def __init__(self, *said: Message) -> None:
        self._said = list(said)
        self.num_said = 0
        self.heard: list[Message] = []
        self.began = asyncio.Event()

    async def receive(self) -> Message:
        if not self._said:
            await asyncio.Event().wait()
        self.num_said += 1
        return self._said.pop(0)

    async def send(self, message: Message) -> None:
        self.heard.append(message)
        self.began.set()

    @property
    def head(self) -> tuple[int, dict[bytes, bytes]]:
        return self.heard[0]["status"], dict(self.heard[0]["headers"])

    @property
    def body(self) -> bytes:
        return b"".join(message["body"] for message in self.heard[1:])

    @property
    def is_whole(self) -> bool:
        return self.heard[-1].get("more_body") is False


def part(body: bytes, *, is_last: bool = True) -> Message:
    return {"type": "http.request", "body": body, "more_body": not is_last}


def scope(
    path: str = "/", *, method: str = "POST", headers: Iterable[tuple[str, str]] = (), **more: Any
) -> Message:
    raw = [(name.lower().encode(), value.encode()) for name, value in headers]
    at, _, query = path.partition("?")
    return {
        "type": "http",
        "method": method,
        "path": at,
        "raw_path": at.encode(),
        "query_string": query.encode(),
        "headers": raw,
        "client": ("127.0.0.1", 1234),
        **more,
    }


async def echo(request: web.Request) -> web.StreamResponse:
    read = await request.read()
    told = {
        "method": request.method,
        "target": request.path_qs,
        "body": read.decode(),
        "remote": request.remote,
        "length": request.content_length,
        "word": request.headers.get("X-Word"),
    }
    return web.json_response(told, status=201, headers={"X-Told": "yes"})


async def stream(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    await response.write(b"data: 1\n\n")
    await response.write(b"data: 2\n\n")
    if "cut" in request.query:
        assert request.transport is not None
        request.transport.close()
        return response
    if "wait" in request.query:
        try:
            await asyncio.Event().wait()
        finally:
            request.app[LEFT].set()
    await response.write_eof()
    return response


LEFT = web.AppKey("LEFT", asyncio.Event)


@asynccontextmanager
async def served(*middlewares: Any) -> AsyncIterator[tuple[Asgi, web.Application]]:
    app = web.Application(middlewares=middlewares)
    app.router.add_post("/echo", echo)
    app.router.add_get("/metrics", echo)
    app.router.add_get("/health", echo)
    app.router.add_post("/stream", stream)
    app.router.add_put("/{any:.*}", echo)
    app[LEFT] = asyncio.Event()
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        yield Asgi(lambda: app), app
    finally:
        await runner.cleanup()


@on_a_loop
async def test_a_request_arrives_as_it_was_sent_and_its_answer_goes_back() -> None:
    async with served() as (asgi, _):
        client = Client(part(b"all of it"))
        headers = (("X-Word", "yes"), ("Content-Length", "9"))
        await asgi(scope("/echo?a=1&b=%20", headers=headers), client.receive, client.send)
        status, told = client.head
        assert (status, told[b"x-told"], told[b"content-type"][:16]) == (
            201,
            b"yes",
            b"application/json",
        )
        assert json.loads(client.body) == {
            "method": "POST",
            "target": "/echo?a=1&b=%20",
            "body": "all of it",
            "remote": "127.0.0.1",
            "length": 9,
            "word": "yes",
        }
        assert client.is_whole


@on_a_loop
async def test_who_waits_to_send_its_body_gets_one_answer_the_head_first() -> None:
    async with served() as (asgi, _):
        client = Client(part(b"all of it"))
        headers = (("Expect", "100-continue"), ("Content-Length", "9"))
        await asgi(scope("/echo", headers=headers), client.receive, client.send)
        assert client.head[0] == 201
        assert json.loads(client.body)["body"] == "all of it"


@on_a_loop
async def test_a_path_that_looks_like_a_host_is_a_path() -> None:
    async with served() as (asgi, _):
        client = Client(part(b""))
        await asgi(scope("//[", method="PUT"), client.receive, client.send)
        assert client.head[0] == 201


@on_a_loop
async def test_serves_own_headers_are_not_said_twice() -> None:
    async with served() as (asgi, _):
        client = Client(part(b""))
        await asgi(scope("/echo"), client.receive, client.send)
        assert not {b"date", b"server", b"transfer-encoding", b"connection"} & client.head[1].keys()


@on_a_loop
async def test_a_body_may_come_in_parts() -> None:
    async with served() as (asgi, _):
        client = Client(part(b"one ", is_last=False), part(b"", is_last=False), part(b"two"))
        await asgi(scope("/echo"), client.receive, client.send)
        assert json.loads(client.body)["body"] == "one two"


@on_a_loop
async def test_a_body_is_fetched_no_faster_than_it_is_read_and_yet_all_of_it() -> None:
    num_parts = 64
    client = Client(
        *(part(bytes(READ_BYTES), is_last=n == num_parts - 1) for n in range(num_parts))
    )
    ahead: list[int] = []

    @web.middleware
    async def slow(request: web.Request, handler: Handler) -> web.StreamResponse:
        del handler
        num_bytes = 0
        while data := await request.content.read(1000):
            ahead.append(client.num_said * READ_BYTES - num_bytes)
            num_bytes += len(data)
        return web.json_response(num_bytes)

    async with served(slow) as (asgi, _):
        await asgi(scope("/echo"), client.receive, client.send)
    assert json.loads(client.body) == num_parts * READ_BYTES
    assert max(ahead) <= 4 * READ_BYTES


@on_a_loop
async def test_each_part_of_an_answer_is_passed_when_it_is_written() -> None:
    async with served() as (asgi, _):
        client = Client(part(b""))
        await asgi(scope("/stream"), client.receive, client.send)
        assert [m["body"] for m in client.heard[1:]] == [b"data: 1\n\n", b"data: 2\n\n", b""]
        assert client.is_whole


@on_a_loop
async def test_an_answer_that_broke_off_is_never_whole() -> None:
    async with served() as (asgi, _):
        client = Client(part(b""))
        with pytest.raises(BrokenAnswerError):
            await asgi(scope("/stream?cut=1"), client.receive, client.send)
        assert client.body == b"data: 1\n\ndata: 2\n\n"
        assert not client.is_whole


@on_a_loop
async def test_a_client_that_leaves_within_its_body_is_no_whole_request() -> None:
    async with served() as (asgi, _):
        client = Client(part(b"one", is_last=False), {"type": "http.disconnect"})
        with pytest.raises(web.RequestPayloadError):
            await asgi(scope("/echo"), client.receive, client.send)
        assert client.heard == []


@on_a_loop
async def test_a_request_that_serve_cancels_ends() -> None:
    async with served() as (asgi, app):
        client = Client(part(b""))
        asking = asyncio.ensure_future(asgi(scope("/stream?wait=1"), client.receive, client.send))
        await client.began.wait()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert app[LEFT].is_set()


@on_a_loop
async def test_serves_lifespan_is_answered_and_websockets_are_not() -> None:
    async with served() as (asgi, _):
        client = Client({"type": "lifespan.startup"}, {"type": "lifespan.shutdown"})
        await asgi({"type": "lifespan"}, client.receive, client.send)
        assert [message["type"] for message in client.heard] == [
            "lifespan.startup.complete",
            "lifespan.shutdown.complete",
        ]
        with pytest.raises(NotImplementedError, match="'websocket' is not served"):
            await asgi(scope(type="websocket"), client.receive, client.send)


@on_a_loop
async def test_without_keys_only_this_machine_is_answered() -> None:
    has_keys = False
    async with served(only_here(lambda: has_keys)) as (asgi, _):

        async def ask(path: str, client: tuple[str, int] | None) -> int:
            found = Client(part(b""))
            await asgi(scope(path, method="GET", client=client), found.receive, found.send)
            return found.head[0]

        far = ("10.0.0.7", 1)
        assert await ask("/metrics", ("::1", 1)) == 201
        assert await ask("/metrics", far) == 403
        assert await ask("/metrics", None) == 403
        assert await ask("/health", far) == 201
        has_keys = True
        assert await ask("/metrics", far) == 201
