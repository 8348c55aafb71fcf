"""Which headers go on to an engine and which come back to a client."""

import re
import uuid
from collections.abc import Mapping

from aiohttp import hdrs
from multidict import CIMultiDict, CIMultiDictProxy

__all__ = [
    "COLD_START",
    "QUEUE_MS",
    "REQUEST_ID",
    "for_client",
    "for_engine",
    "request_id",
    "told",
]

REQUEST_ID = "X-Request-Id"
QUEUE_MS = "X-Kvcached-Queue-Ms"
COLD_START = "X-Kvcached-Cold-Start"
OURS = "x-kvcached-"
SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}", re.ASCII)

# They speak of one connection and not of the message (RFC 9110, 7.6.1).
HOP_BY_HOP = frozenset({
    *("connection", "keep-alive", "proxy-connection", "proxy-authenticate"),
    *("proxy-authorization", "te", "trailer", "transfer-encoding", "upgrade"),
})  # fmt: skip
# What we are asked with is ours alone; a page's origin is judged here, where nothing allows one.
NOT_FOR_ENGINES = HOP_BY_HOP | {
    *("host", "content-length", "expect", "authorization", "x-api-key", "api-key", "cookie"),
    *("origin", "x-request-id", "access-control-request-method", "access-control-request-headers"),
}
NOT_FOR_CLIENTS = HOP_BY_HOP | {
    *("x-request-id", "set-cookie", "www-authenticate", "access-control-allow-origin"),
    *("access-control-allow-credentials", "access-control-expose-headers"),
}


def request_id(given: str | None) -> str:
    """Return the id of a request: the client's where it is short and plain, else a new one."""
    if given is not None and SANE_ID.fullmatch(given):
        return given
    return uuid.uuid4().hex


def for_engine(
    headers: CIMultiDictProxy[str], id_: str, own: Mapping[str, str]
) -> CIMultiDict[str]:
    """Return what goes on to an engine.

    Args:
        headers: The client's.
        id_: The request's id.
        own: What each request to this engine carries, such as its key.
    """
    kept = _kept(headers, NOT_FOR_ENGINES)
    kept[REQUEST_ID] = id_
    kept.update(own)
    return kept


def for_client(headers: CIMultiDictProxy[str], id_: str) -> CIMultiDict[str]:
    """Return what goes back to a client of an engine's headers."""
    kept = _kept(headers, NOT_FOR_CLIENTS)
    kept[REQUEST_ID] = id_
    return kept


def told(headers: CIMultiDictProxy[str]) -> dict[str, str]:
    """Return what another gateway's answer tells of how the request fared there."""
    return {name: headers[name] for name in (QUEUE_MS, COLD_START) if name in headers}


def _kept(headers: CIMultiDictProxy[str], dropped: frozenset[str]) -> CIMultiDict[str]:
    for named in headers.getall(hdrs.CONNECTION, ()):
        dropped |= {name.strip().lower() for name in named.split(",")}
    kept: CIMultiDict[str] = CIMultiDict()
    for name, value in headers.items():
        low = name.lower()
        if low not in dropped and not low.startswith(OURS):
            kept.add(name, value)
    return kept
