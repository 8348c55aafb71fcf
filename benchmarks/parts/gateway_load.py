"""A client that costs next to nothing: requests over connections of its own, and their times."""

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

END = b"0\r\n\r\n"


@dataclass(frozen=True)
class Taken:
    """What one request took.

    Attributes:
        ttft_seconds: To the first event.
        seconds: To the last byte.
        num_events: How many events came.
    """

    ttft_seconds: float
    seconds: float
    num_events: int


def request(
    host: str,
    *,
    num_tokens: int = 1,
    prompt_bytes: int = 1024,
    every_us: int = 0,
    model: str | None = None,
) -> bytes:
    """Return the bytes of a chat request, as a stream.

    Args:
        host: What its header `Host` says.
        num_tokens: How many events it asks for.
        prompt_bytes: The size of its prompt.
        every_us: How far they are apart; 0 for not at all.
        model: The model's name, where it is another one than those of the stand-in.
    """
    if model is None:
        model = f"every-{every_us}-us" if every_us else "standin"
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "word " * (prompt_bytes // 5)}],
        "max_tokens": num_tokens,
        "stream": True,
    }
    return post("/v1/chat/completions", host, body)


def post(path: str, host: str, body: Mapping[str, Any]) -> bytes:
    """Return the bytes of a request whose answer is a stream.

    Args:
        path: What is asked.
        host: What its header `Host` says.
        body: What it says.
    """
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        "Accept: text/event-stream\r\nUser-Agent: load\r\nAuthorization: Bearer sk-none\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


class Connection(asyncio.Protocol):
    """One connection, with one request at a time."""

    def __init__(self) -> None:
        self._done: asyncio.Future[Taken] | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        if self._done is not None and not self._done.done():
            self._done.set_exception(exc or ConnectionError("the server closed the connection"))

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        if not self._tail and not data.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"the answer begins with {data[:500]!r}")
        num = data.count(b"data: ")
        if num and not self._num:
            self._first = time.perf_counter()
        self._num += num
        self._tail = (self._tail + data)[-len(END) :] if len(data) < len(END) else data
        if self._tail.endswith(END) and self._done is not None:
            now = time.perf_counter()
            self._done.set_result(Taken(self._first - self._begun, now - self._begun, self._num))

    async def ask(self, data: bytes) -> Taken:
        """Send a request and return what it took."""
        if self._transport is None:
            raise RuntimeError("not connected")
        self._done = asyncio.get_running_loop().create_future()
        self._tail, self._num, self._first = b"", 0, 0.0
        self._begun = time.perf_counter()
        self._transport.write(data)
        return await self._done

    def close(self) -> None:
        """Close it."""
        if self._transport is not None:
            self._transport.close()


async def connect(at: int | str) -> Connection:
    """Return a connection to a port of the loopback, or to a Unix socket by its path."""
    loop = asyncio.get_running_loop()
    if isinstance(at, str):
        return (await loop.create_unix_connection(Connection, at))[1]
    return (await loop.create_connection(Connection, "127.0.0.1", at))[1]


async def ask_many(at: int | str, data: bytes, *, num: int, at_once: int) -> list[Taken]:
    """Send a request `num` times, `at_once` of them at a time, each over its own connection."""
    connections = [await connect(at) for _ in range(at_once)]
    left = iter(range(num))
    taken: list[Taken] = []

    async def work(connection: Connection) -> None:
        for _ in left:
            taken.append(await connection.ask(data))  # noqa: PERF401  as they come

    try:
        await asyncio.gather(*map(work, connections))
    finally:
        for connection in connections:
            connection.close()
    return taken
