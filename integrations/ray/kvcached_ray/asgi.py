"""The front behind ASGI: a request of Serve's becomes one of aiohttp's, in the same process."""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, cast

from aiohttp import StreamReader, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import HttpVersion11, RawRequestMessage
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

__all__ = ["Asgi", "BrokenAnswerError", "Message", "Receive", "Send"]

READ_BYTES = 1 << 16
# Serve's proxy says these itself, the request's id among them; the others are of one connection.
SERVES_OWN = frozenset({
    *(b"date", b"server", b"x-request-id"),
    *(b"connection", b"keep-alive", b"transfer-encoding"),
})  # fmt: skip
# Serve's proxy has answered it; a second answer would come before the head of ours.
EXPECT = b"expect"

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class BrokenAnswerError(ConnectionError):
    """An answer broke off; raised so that Serve closes the client's connection behind it."""


class Asgi:
    """An ASGI application that an application of aiohttp's answers.

    Args:
        find: Returns the application, which has been started.
    """

    def __init__(self, find: Callable[[], web.Application]) -> None:
        self._find = find

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request; see the ASGI specification.

        Raises:
            BrokenAnswerError: If its answer broke off.
        """
        if scope["type"] == "lifespan":
            await _live(receive, send)
            return
        if scope["type"] != "http":
            raise NotImplementedError(f"{scope['type']!r} is not served, only 'http'")
        connection = _Connection(scope)
        payload = StreamReader(cast("Any", connection), READ_BYTES)
        message = await receive()
        is_whole = _feed(payload, message)
        task = None if is_whole else asyncio.ensure_future(_read(payload, receive, connection))
        try:
            await self._answer(_request(scope, connection, payload, _Writer(send)), connection)
        finally:
            if task is not None:
                task.cancel()

    async def _answer(self, request: web.Request, connection: "_Connection") -> None:
        response = await self._find()._handle(request)
        if not connection.is_closed:
            await response.prepare(request)
            await response.write_eof()
        if connection.is_closed:
            raise BrokenAnswerError("the answer broke off; the client is to see that")


class _Connection:
    """What aiohttp knows of a connection, and what closes it: protocol and transport in one."""

    connected = True
    ssl_context = None
    sockname = None
    max_field_size = max_line_length = 8190
    max_headers = 128

    def __init__(self, scope: Message) -> None:
        self.peername = scope.get("client")
        self.transport = self
        self.is_closed = False
        self._reading_paused = False
        self._resumed = asyncio.Event()
        self._resumed.set()

    def close(self) -> None:
        """Let the answer be seen as broken off."""
        self.is_closed = True

    def pause_reading(self) -> None:
        """Let the rest of the body wait: the front has not read what is there."""
        self._reading_paused = True
        self._resumed.clear()

    def resume_reading(self, *, resume_parser: bool = True) -> None:
        """Let it come again."""
        del resume_parser
        self._reading_paused = False
        self._resumed.set()

    async def may_read(self) -> None:
        """Wait while reading is paused."""
        await self._resumed.wait()


class _Writer(AbstractStreamWriter):
    """Writes an answer as ASGI's messages."""

    def __init__(self, send: Send) -> None:
        self._send = send

    async def write_headers(self, status_line: str, headers: CIMultiDict[str]) -> None:
        """See `AbstractStreamWriter`."""
        kept = [
            (name.lower().encode("latin-1"), value.encode("utf-8", "surrogateescape"))
            for name, value in headers.items()
            if name.lower().encode("latin-1") not in SERVES_OWN
        ]
        status = int(status_line.split(" ", 2)[1])
        await self._send({"type": "http.response.start", "status": status, "headers": kept})

    async def write(self, chunk: bytes | bytearray | memoryview) -> None:
        """See `AbstractStreamWriter`."""
        if chunk:
            await self._send(_body(bytes(chunk), is_last=False))

    async def write_eof(self, chunk: bytes = b"") -> None:
        """See `AbstractStreamWriter`."""
        await self._send(_body(chunk, is_last=True))

    async def drain(self) -> None:
        """See `AbstractStreamWriter`; Serve takes what it gets."""

    def enable_compression(self, encoding: str = "deflate", strategy: int | None = None) -> None:
        """See `AbstractStreamWriter`.

        Raises:
            NotImplementedError: Always: bytes pass as they are.
        """
        raise NotImplementedError(f"{encoding!r} is not written")

    def enable_chunking(self) -> None:
        """See `AbstractStreamWriter`; Serve's proxy does that."""


def _body(data: bytes, *, is_last: bool) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": not is_last}


def _request(
    scope: Message, connection: _Connection, payload: StreamReader, writer: _Writer
) -> web.Request:
    path = scope.get("raw_path") or scope["path"].encode()
    query = scope.get("query_string", b"")
    target = (path + b"?" + query if query else path).decode("latin-1")
    raw = tuple((name, value) for name, value in scope["headers"] if name != EXPECT)
    headers = CIMultiDict(
        (name.decode("latin-1"), value.decode("utf-8", "surrogateescape")) for name, value in raw
    )
    is_chunked = "chunked" in headers.get("Transfer-Encoding", "").lower()
    message = RawRequestMessage(
        scope["method"],
        target,
        HttpVersion11,
        CIMultiDictProxy(headers),
        raw,
        should_close=False,
        compression=None,
        upgrade=False,
        chunked=is_chunked,
        # Of its parts: what stands behind `//` is no host here.
        url=URL.build(
            path=path.decode("latin-1"), query_string=query.decode("latin-1"), encoded=True
        ),
    )
    task: Any = asyncio.current_task()
    loop = asyncio.get_running_loop()
    return web.Request(message, payload, cast("Any", connection), writer, task, loop)


def _feed(payload: StreamReader, message: Message) -> bool:
    """Give on what came of a body; say whether that was the end."""
    if message["type"] == "http.disconnect":
        payload.set_exception(web.RequestPayloadError("the client left"))
        return True
    if body := message.get("body"):
        payload.feed_data(body)
    if message.get("more_body"):
        return False
    payload.feed_eof()
    return True


async def _read(payload: StreamReader, receive: Receive, connection: _Connection) -> None:
    """Read a body to its end, no faster than the front does."""
    is_whole = False
    while not is_whole:
        await connection.may_read()
        is_whole = _feed(payload, await receive())


async def _live(receive: Receive, send: Send) -> None:
    """Say that nothing is to be done before the first request and behind the last."""
    kind = ""
    while kind != "lifespan.shutdown":
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
