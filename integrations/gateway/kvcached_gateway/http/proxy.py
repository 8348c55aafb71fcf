"""One request to one engine: bytes through both ways, as they come."""

import asyncio
import io
import socket
from dataclasses import dataclass, field

import aiohttp
from aiohttp import hdrs, web
from yarl import URL

from kvcached_gateway.errors import EngineDiedError
from kvcached_gateway.http import headers
from kvcached_gateway.http.error_answers import ENGINE_DIED, error_event, is_error_event
from kvcached_gateway.http.silence import end_when_silent
from kvcached_gateway.lease import Address, Ending, Lease

__all__ = ["Outcome", "Proxy"]

# Engines that we start close no idle connection, so that these serve also a burst that comes later.
OUR_KEEPALIVE_SECONDS = 60.0
KEEPALIVE_SECONDS = 3.0  # another server may close what was idle for 5 s; what we reuse is younger
CONNECT_SECONDS = 10.0
UNUSED_SECONDS = 600.0  # an address that nobody asked for so long is forgotten
LONG_BODY_BYTES = 1 << 20  # longer ones are written in pieces, so that the loop goes on
READ_BYTES = 1 << 16
EVENT_STREAM = "text/event-stream"
EVENT_END = b"\n\n"
SILENT_SECONDS = 5  # a request to a machine that is gone is asked again about this long after


@dataclass(frozen=True)
class Outcome:
    """What became of a request at its engine.

    Attributes:
        response: What its client got.
        status: The engine's status; 502 where the engine died after the first byte.
        first_byte_at: When the first byte came, as the loop's time; None where there was none.
    """

    response: web.StreamResponse
    status: int
    first_byte_at: float | None


@dataclass
class _Pool:
    """The connections to one address."""

    session: aiohttp.ClientSession
    urls: dict[str, URL] = field(default_factory=dict)
    num_requests: int = 0  # now
    last_used: float = 0.0


class Proxy:
    """Sends requests to engines over connections that it keeps, one pool for each address."""

    def __init__(self) -> None:
        self._pools: dict[tuple[str, str | None], _Pool] = {}

    async def close(self) -> None:
        """Close all connections."""
        pools = list(self._pools.values())
        self._pools.clear()
        for pool in pools:
            await pool.session.close()

    async def forward(
        self,
        request: web.Request,
        body: bytes,
        lease: Lease,
        id_: str,
        begun: web.StreamResponse | None = None,
    ) -> Outcome:
        """Ask the engine of a lease, and pass its answer on; the lease has ended when it returns.

        Args:
            request: The client's request, for its path and its headers.
            body: What was read of it.
            lease: The right to the engine.
            id_: The request's id.
            begun: A stream of events that the client is being answered with already.

        Raises:
            EngineDiedError: If the engine went away before the first byte; the lease is still held.
            ConnectionError: If the client went away; the lease has ended.
        """
        pool = await self._pool(lease.address)
        pool.num_requests += 1
        try:
            answer, chunk = await _ask(pool, request, body, lease, id_)
            try:
                return await _pass_on(request, answer, chunk, lease, id_, begun)
            finally:
                answer.close()  # a connection that brought its whole answer is back in the pool
        except EngineDiedError:
            raise
        except BaseException:
            lease.end(Ending.CANCELLED)
            raise
        finally:
            pool.num_requests -= 1

    async def _pool(self, address: Address) -> _Pool:
        now = asyncio.get_running_loop().time()
        known = (address.url, address.socket)
        pool = self._pools.get(known)
        if pool is None:  # known before anything is awaited: a second request is to find it
            pool = self._pools[known] = _Pool(_session(address), last_used=now)
            await self._forget_unused(now)
        pool.last_used = now
        return pool

    async def _forget_unused(self, now: float) -> None:
        for known, pool in list(self._pools.items()):
            if not pool.num_requests and now - pool.last_used > UNUSED_SECONDS:
                del self._pools[known]
                await pool.session.close()


def _session(address: Address) -> aiohttp.ClientSession:
    seconds = OUR_KEEPALIVE_SECONDS if address.is_ours else KEEPALIVE_SECONDS
    connector: aiohttp.BaseConnector
    if address.socket is not None:
        connector = aiohttp.UnixConnector(address.socket, limit=0, keepalive_timeout=seconds)
    else:
        connector = aiohttp.TCPConnector(
            limit=0,
            keepalive_timeout=seconds,
            socket_factory=_watched if address.is_gateway else None,
        )
    return aiohttp.ClientSession(
        connector=connector,
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        read_bufsize=READ_BYTES,
        skip_auto_headers=(hdrs.USER_AGENT, hdrs.ACCEPT, hdrs.ACCEPT_ENCODING, hdrs.CONTENT_TYPE),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
    )


def _watched(address: aiohttp.AddrInfoType) -> socket.socket:
    """Return a socket whose connection ends soon after its other side fell silent."""
    family, kind, protocol, *_ = address
    made = socket.socket(family, kind, protocol)
    end_when_silent(made, SILENT_SECONDS)
    return made


async def _ask(
    pool: _Pool, request: web.Request, body: bytes, lease: Lease, id_: str
) -> tuple[aiohttp.ClientResponse, bytes]:
    """Send the request; return the answer and its first bytes, which are empty if it has none."""
    target = request.path_qs  # one of the public paths: they need no quoting
    url = pool.urls.get(request.path) if request.path == target else None
    if url is None:
        url = URL(lease.address.url + target, encoded=True)
        if request.path == target:
            pool.urls[target] = url
    data: bytes | io.BytesIO = body if len(body) < LONG_BODY_BYTES else io.BytesIO(body)
    try:
        answer = await pool.session.request(
            request.method,
            url,
            data=data,
            headers=headers.for_engine(request.headers, id_, lease.address.headers),
            allow_redirects=False,
        )
        try:
            chunk = await answer.content.readany()
        except BaseException:
            answer.close()
            raise
    except (aiohttp.ClientError, OSError) as error:
        raise EngineDiedError(
            f"the engine of model {lease.model_id!r} went away before it answered: {error!r}"
        ) from error
    if not lease.first_byte():
        answer.close()
        raise EngineDiedError(f"the engine of model {lease.model_id!r} ended before it answered")
    return answer, chunk


async def _pass_on(
    request: web.Request,
    answer: aiohttp.ClientResponse,
    chunk: bytes,
    lease: Lease,
    id_: str,
    begun: web.StreamResponse | None,
) -> Outcome:
    first_byte_at = asyncio.get_running_loop().time()
    if begun is None:
        response = await _begin(request, answer, lease, id_)
    else:
        response = begun
    is_event_stream = answer.content_type == EVENT_STREAM
    write, read = response.write, answer.content.readany
    if begun is not None and not is_event_stream:
        try:
            event, status, ending = await _read_as_event(answer, chunk), answer.status, Ending.DONE
        except (aiohttp.ClientError, OSError) as error:
            event = error_event(ENGINE_DIED, _died(lease, error))
            status, ending = web.HTTPBadGateway.status_code, Ending.DIED_WITHIN
        lease.end(ending, status=answer.status)
        await write(event)
        cut(request)
        return Outcome(begun, status, first_byte_at)
    is_told_there = is_event_stream and lease.address.is_gateway
    last = b""
    while chunk:
        await write(chunk)
        last = _last_event(last + chunk) if is_told_there else chunk
        try:
            chunk = await read()
        except (aiohttp.ClientError, OSError) as error:
            lease.end(Ending.DIED_WITHIN, status=answer.status)
            is_told = is_told_there and is_error_event(last)
            if is_event_stream and not is_told:
                await write(_torn(last) + error_event(ENGINE_DIED, _died(lease, error)))
            cut(request)
            return Outcome(response, web.HTTPBadGateway.status_code, first_byte_at)
    lease.end(Ending.DONE, status=answer.status)
    await response.write_eof()
    return Outcome(response, answer.status, first_byte_at)


async def _begin(
    request: web.Request, answer: aiohttp.ClientResponse, lease: Lease, id_: str
) -> web.StreamResponse:
    passed = headers.for_client(answer.headers, id_)
    passed[headers.QUEUE_MS] = str(round(1000 * lease.waited_seconds))
    passed[headers.COLD_START] = lease.woken.value
    if lease.address.is_gateway:  # the request waited there
        passed.update(headers.told(answer.headers))
    response = web.StreamResponse(status=answer.status, reason=answer.reason, headers=passed)
    await response.prepare(request)
    return response


def cut(request: web.BaseRequest) -> None:
    """Close a client's connection behind what was written, so that no answer looks whole."""
    if request.transport is not None:
        request.transport.close()


async def _read_as_event(answer: aiohttp.ClientResponse, chunk: bytes) -> bytes:
    """Return an answer that is no stream, such as an error, for a client that has one already."""
    body = chunk + await answer.content.read()
    return b"".join(b"data: " + line + b"\n" for line in body.splitlines()) + b"\n"


def _last_event(stream: bytes) -> bytes:
    """Return what came since the last event but one; of one that is very long, its end."""
    begin = stream.rfind(EVENT_END, 0, -len(EVENT_END))
    event = stream if begin < 0 else stream[begin + len(EVENT_END) :]
    return event[-READ_BYTES:]


def _torn(last: bytes) -> bytes:
    """Return what ends an event that broke off."""
    return b"" if last.endswith(EVENT_END) else EVENT_END


def _died(lease: Lease, error: BaseException) -> str:
    return f"the engine of model {lease.model_id!r} died within its answer: {type(error).__name__}"
