"""A server that streams as fast as it is asked to, in place of an engine. For benchmarks alone.

It reads of a body only `max_tokens` and, from the model's name `every-N-us`, how far its events are
apart. All streams tick together, as an engine's steps do.
"""

import asyncio
import json
import re
from collections.abc import Callable
from typing import cast

import uvloop

TOKENS = re.compile(rb'"max_tokens":\s*(\d+)')
PACE = re.compile(rb'"every-(\d+)-us"')
LENGTH = re.compile(rb"content-length:\s*(\d+)", re.IGNORECASE)
HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def _event(delta: dict[str, str], finish: str | None) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    event = {
        "id": "chatcmpl-0123456789abcdef0123456789abcdef",
        "object": "chat.completion.chunk",
        "created": 1_764_000_000,
        "model": "standin",
        "choices": [choice],
    }
    return _chunk(b"data: " + json.dumps(event).encode() + b"\n\n")


EVENT = _event({"content": " word"}, None)
MODELS = b'{"object": "list", "data": [{"id": "standin"}]}'
LISTED = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (
    len(MODELS),
    MODELS,
)
LAST = _event({"content": ""}, "stop") + _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


class _Stream(asyncio.Protocol):
    """One connection: a request, its events, the next request."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._received = b""

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, blank, body = self._received.partition(b"\r\n\r\n")
        length = LENGTH.search(head)
        if not blank or len(body) < (int(length[1]) if length else 0):
            return
        self._received = b""
        if head.startswith(b"GET "):
            self._transport.write(LISTED)  # of its models, which a gateway asks for
            return
        tokens, pace = TOKENS.search(body), PACE.search(body)
        num = int(tokens[1]) if tokens else 1
        if pace is None:
            self._transport.write(HEAD + EVENT * num + LAST)
            return
        self._transport.write(HEAD)
        self._tick(num, int(pace[1]) * 1e-6, asyncio.get_running_loop().time())

    def _tick(self, num_left: int, seconds: float, due: float) -> None:
        if self._transport.is_closing():
            return
        self._transport.write(EVENT if num_left else LAST)
        if num_left:
            due += seconds
            asyncio.get_running_loop().call_at(due, self._tick, num_left - 1, seconds, due)


def serve(port: int, started: Callable[[], None]) -> None:
    """Be the server, for ever."""

    async def run() -> None:
        server = await asyncio.get_running_loop().create_server(_Stream, "127.0.0.1", port)
        started()
        await server.serve_forever()

    uvloop.run(run())
