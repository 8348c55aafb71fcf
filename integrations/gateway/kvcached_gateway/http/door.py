"""The door of the public port: as many connections as this process has files for; others a 503."""

import asyncio
import resource
from typing import cast

from aiohttp import web

from kvcached_gateway.http.error_answers import error_json
from kvcached_gateway.http.front import Front
from kvcached_gateway.http.silence import end_when_silent

__all__ = ["Door", "allow_files"]

ENOUGH_FILES = 65_536
FILES_A_REQUEST = 2  # its client's connection, and one to its engine
RESERVED_FILES = 256  # for engines, logs and state, and for those that are being refused
LEAST_CONNECTIONS = 1
# How many may wait for this loop to accept them; the kernel drops others, which try again after
# seconds. It has a bound of its own, `net.core.somaxconn`.
MAX_COMING = 4096
LAST_SECONDS = 1.0  # what a refused client has to read why
SILENT_SECONDS = 120  # whoever is gone, or takes nothing of its answer, is let go so much later
CODE = "too_many_connections"
TEXT = "the gateway has as many connections as it has files for; see `ulimit -n`"
_BODY = error_json("server_error", CODE, TEXT).encode()
ANSWER = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
    b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(_BODY), _BODY)
)


def allow_files() -> None:
    """Let this process have as many files as it may, within reason."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = ENOUGH_FILES if hard == resource.RLIM_INFINITY else min(hard, ENOUGH_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def max_connections() -> int:
    """Return how many connections this process has files for."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = ENOUGH_FILES if soft == resource.RLIM_INFINITY else soft
    return max((files - RESERVED_FILES) // FILES_A_REQUEST, LEAST_CONNECTIONS)


class Door(web.BaseSite):
    """Where clients come in; how many may be inside is settled when it opens.

    Args:
        runner: What serves them.
        front: Whose observer counts those that are refused.
        host: The address to listen on.
        port: The port, or 0 for any that is free.
        is_shared: Whether other processes listen on the port, too.
    """

    def __init__(
        self, runner: web.AppRunner, front: Front, host: str, port: int, *, is_shared: bool = False
    ) -> None:
        super().__init__(runner)
        self._front = front
        self._place = (host, port)
        self._is_shared = is_shared
        self._most = max_connections()

    @property
    def name(self) -> str:
        """See `web.BaseSite`."""
        host, port = self._place
        return f"http://{host}:{port}"

    async def start(self) -> None:
        """See `web.BaseSite`."""
        await super().start()
        host, port = self._place
        server = self._server = await asyncio.get_running_loop().create_server(
            self._come,
            host,
            port,
            reuse_port=self._is_shared or None,
            backlog=MAX_COMING,
            start_serving=False,
        )
        for listening in server.sockets:
            end_when_silent(listening, SILENT_SECONDS)
        await server.start_serving()

    def _come(self) -> asyncio.Protocol:
        """Return who speaks with a client that connects."""
        server = self._runner.server
        if server is not None and len(server.connections) < self._most:
            return server()
        self._front.observe.refused(None, CODE)
        return _Refusal()


class _Refusal(asyncio.Protocol):
    """Tells a client that there is no place, reads what it says meanwhile, and hangs up."""

    def __init__(self) -> None:
        self._end: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        writing = cast("asyncio.Transport", transport)
        writing.write(ANSWER)
        writing.write_eof()
        # What a client sends after a close would cut the answer off.
        self._end = asyncio.get_running_loop().call_later(LAST_SECONDS, transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        del exc
        if self._end is not None:
            self._end.cancel()
